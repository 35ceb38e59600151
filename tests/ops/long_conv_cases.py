"""Long convolutions drawn at random, computed directly in float64, and how far two computations are apart."""

from dataclasses import dataclass

import numpy
import torch

from longtrain.ops.long_conv.call import Call, Gradients, Wanted, build_call

NAMES = ("y", "du_BTE", "dk_HW", "dskip_E", "dgate_in_BTE", "dgate_out_BTE")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes and options of one call."""

    B: int
    T: int
    E: int
    H: int
    W: int
    causal: bool
    edges: tuple[int, ...]
    skip: bool
    gate_in: bool
    gate_out: bool
    dtype: torch.dtype
    seed: int

    def call(self) -> tuple[Call, torch.Tensor, Wanted]:
        """The call with normal inputs, dy, and every gradient there is."""
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(self.dtype)

        whole = (self.B, self.T, self.E)
        u, k, dy = normal(*whole), normal(self.H, self.W), normal(*whole)
        skip, gate_in, gate_out = (normal(*shape) if there else None for there, shape in (
            (self.skip, (self.E,)), (self.gate_in, whole), (self.gate_out, whole)))
        wanted = Wanted(u=True, k=True, skip=self.skip, gate_in=self.gate_in, gate_out=self.gate_out)
        return build_call(u, k, skip, gate_in, gate_out, self.causal, torch.tensor(self.edges)), dy, wanted


def draw(seed: int, dtype: torch.dtype, longest: int = 2000) -> Case:
    """Lengths spread evenly over powers of two, often odd or 1; filters from one tap to beyond T; documents in one case of three."""
    r = numpy.random.default_rng(seed)

    def length(most: int) -> int:
        return int(min(most, round(2 ** r.uniform(0, numpy.log2(most + 1)))))

    T = length(longest)
    W = (length(2 * T), T, length(max(1, T // 8)))[r.integers(3)]
    E = int(r.integers(1, 21))
    H = int(r.choice([h for h in range(1, E + 1) if E % h == 0])) if r.random() < 0.3 else E
    cuts = r.integers(0, T + 1, size=r.integers(1, 5)) if r.random() < 0.33 else []
    flags = r.random(4) < 0.5
    return Case(B=int(r.integers(1, 3)), T=T, E=E, H=H, W=max(1, W), causal=bool(flags[0]), edges=(0, *sorted(map(int, cuts)), T),
                skip=bool(flags[1]), gate_in=bool(flags[2]), gate_out=bool(flags[3]), dtype=dtype, seed=seed)


def widened(call: Call) -> Call:
    names = ("u_BTE", "k_HW", "skip_E", "gate_in_BTE", "gate_out_BTE")
    tensors = {name: None if (x := getattr(call, name)) is None else x.double() for name in names}
    return Call(**tensors, causal=call.causal, edges=call.edges)


def directly(call: Call, dy_BTE: torch.Tensor, wanted: Wanted) -> dict[str, torch.Tensor]:
    """Output and gradients in float64, by Toeplitz matrices: K[i, j] is the tap at lag i - j. No transform takes part."""
    call, dy_BTE = widened(call), dy_BTE.double()
    u, gate_in, gate_out = call.u_BTE, call.gate_in_BTE, call.gate_out_BTE
    v = u if gate_in is None else u * gate_in
    g = dy_BTE if gate_out is None else dy_BTE * gate_out
    conv, dv, dk = torch.zeros_like(v), torch.zeros_like(v), torch.zeros_like(call.k_HW)
    W = call.k_HW.shape[1]
    for document in call.documents:
        length = document.stop - document.start
        lag = torch.arange(length)[:, None] - torch.arange(length)
        met = (lag >= 0) & (lag < W) if call.causal else (lag < (W + 1) // 2) & (lag >= -(W // 2))
        for head in range(dk.shape[0]):
            channels = slice(head * call.share, (head + 1) * call.share)
            matrix = torch.where(met, call.k_HW[head][lag % W], 0.0)
            conv[:, document, channels] = matrix @ v[:, document, channels]
            dv[:, document, channels] = matrix.T @ g[:, document, channels]
            pairs = torch.einsum("bie,bje->ij", g[:, document, channels], v[:, document, channels])
            dk[head].index_add_(0, (lag % W)[met], pairs[met])
    skip = 0.0 if call.skip_E is None else call.skip_E
    mixed, dv = conv + skip * v, dv + skip * g
    return {
        "y": mixed if gate_out is None else mixed * gate_out, "du_BTE": dv if gate_in is None else dv * gate_in, "dk_HW": dk,
        "dskip_E": (g * v).sum((0, 1)), "dgate_in_BTE": dv * u, "dgate_out_BTE": dy_BTE * mixed,
    }


def found(y: torch.Tensor, gradients: Gradients) -> dict[str, torch.Tensor]:
    return {"y": y} | {name: x for name in NAMES[1:] if (x := getattr(gradients, name)) is not None}


def error(a: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, in the Euclidean norm; of what is exactly 0, the norm itself."""
    return float((a.double() - exact).norm() / (exact.norm() if exact.norm() > 0 else 1.0))
