"""Drawn attention calls: every option, every pair of options together, odd sizes, empty sides, rows that see nothing."""

import itertools
import random

import torch

from longtrain.ops.attention import attention, attention_backward

OPTIONS = (
    "window", "q_offset", "k_offset", "sink_tokens", "sink_logits", "block_stride", "packed", "softcap", "scale",
    "dropout", "noncausal", "grouped", "value_dim", "batch", "strided", "lse_gradient",
)
IMPOSSIBLE = {frozenset(("packed", "batch"))}
PAIRS = [p for p in itertools.combinations(OPTIONS, 2) if frozenset(p) not in IMPOSSIBLE]


def drawn_options(number: int) -> set[str]:
    """Case `number` has pair `number % len(PAIRS)` of options for certain and others by chance."""
    rng = random.Random(number)
    chosen = set(PAIRS[number % len(PAIRS)])
    for option in rng.sample(OPTIONS, len(OPTIONS)):
        allowed = all(frozenset((option, other)) not in IMPOSSIBLE for other in chosen)
        if allowed and rng.random() < 0.15:
            chosen.add(option)
    return chosen


def drawn_case(number: int, dtype: torch.dtype, longest: int = 300):
    """(tensors, options) of case `number`: tensors q, k, v, dout, sink_logits, dlse (the last two may be None)."""
    rng = random.Random(1000 + number)
    gen = torch.Generator().manual_seed(number)
    chosen = drawn_options(number)

    def draw(*shape):
        if "strided" in chosen:  # head-major memory and a gap behind every row
            batch, tokens, heads, dim = shape
            full = torch.randn(batch, heads, tokens, dim + 3, generator=gen, dtype=torch.float64)
            return full.to(dtype)[..., :dim].transpose(1, 2)
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    lengths = [0, 1, 2, 7, 33, 65, 96, 193, longest]  # around the kernels' tiles, too
    B = 2 if "batch" in chosen else 1
    T, S = rng.choice(lengths), rng.choice(lengths)
    K = rng.choice([1, 2, 3])
    H = K * (rng.choice([2, 3]) if "grouped" in chosen else 1)
    D = rng.choice([1, 4, 16, 40, 64, 72, 130])
    V = rng.choice([1, 5, 32, 80]) if "value_dim" in chosen else D
    options = {"causal": "noncausal" not in chosen}
    if "window" in chosen:
        options["window_size"] = rng.choice([(0, 0), (3, 0), (20, 2), (-1, 5), (7, -1), (150, 150)])
    if "q_offset" in chosen:
        options["q_offset"] = rng.choice([-5, 0, 10, 60, 250])
    if "k_offset" in chosen:
        options["k_offset"] = rng.choice([-7, 9, 200])
    if "sink_tokens" in chosen:
        options["sink_tokens"] = rng.choice([1, 4, 70])
    if "block_stride" in chosen:
        options["block_stride"] = rng.choice([(1, 2), (4, 3), (16, 1), 2])
    if "softcap" in chosen:
        options["softcap"] = rng.choice([0.5, 1.5, 30.0])
    if "scale" in chosen:
        options["scale"] = rng.choice([0.3, -0.2, 0.0])
    if "dropout" in chosen:
        seed = rng.choice([0, -5, 2**40 + 3])
        options |= {"dropout_p": rng.choice([0.1, 0.6]), "dropout_seed": seed, "head_offset": rng.choice([0, 3])}
    if "packed" in chosen:
        documents = rng.choice([1, 2, 5])
        for side, tokens in (("q", T), ("k", S)):
            inner = sorted(rng.randint(0, tokens) for _ in range(documents - 1))
            first = rng.choice([0, 0, -3]) if side == "k" else 0
            options[f"cu_seqlens_{side}"] = torch.tensor([first, *inner, tokens], dtype=torch.int32)
    tensors = {
        "q": draw(B, T, H, D), "k": draw(B, S, K, D), "v": draw(B, S, K, V), "dout": draw(B, T, H, V),
        "sink_logits": draw(1, 1, 1, H)[0, 0, 0] if "sink_logits" in chosen else None,
        "dlse": draw(1, B, T, H)[0] if "lse_gradient" in chosen else None,
    }
    return tensors, options


def forward_backward(tensors: dict, options: dict, backend: str) -> dict:
    """All results of the functional pair; dk, dv are slices of larger buffers that held something before."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    sink_logits, dlse = tensors["sink_logits"], tensors["dlse"]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = attention(q, k, v, sink_logits=sink_logits, return_lse=True, backend=backend, **options)
    # Poison around dk, dv: a write outside shows, and so does a result that ignores what was there.
    dk_buffer, dv_buffer = (torch.full((*x.shape[:3], x.shape[3] + 2), float("nan"), dtype=wide) for x in (k, v))
    dk, dv = dk_buffer[..., 1:-1].fill_(0.5), dv_buffer[..., 1:-1].fill_(-0.25)
    dsink = None if sink_logits is None else torch.zeros(q.shape[2], dtype=wide)
    dq = attention_backward(
        tensors["dout"], q, k, v, out, lse, dk=dk, dv=dv, sink_logits=sink_logits, dsink=dsink,
        dlse=None if dlse is None else dlse.to(wide), backend=backend, **options,
    )
    for buffer in (dk_buffer, dv_buffer):
        assert buffer[..., 0].isnan().all() and buffer[..., -1].isnan().all()
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk - 0.5, "dv": dv + 0.25}
    return results if dsink is None else results | {"dsink": dsink}


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    """||found - expected|| <= tolerance * (||expected|| + what cancelled): a gradient that is exactly zero, as of a
    softmax over one key, is a sum over all queries of differences of terms of order one."""
    cancelled = max(x.numel() for x in expected.values()) ** 0.5 + expected["dq"].shape[-1]
    for name, right in expected.items():
        left, right = found[name].double(), right.double()
        empty = right.isneginf()
        assert torch.equal(left.isneginf(), empty), name
        error = (left.masked_fill(empty, 0) - right.masked_fill(empty, 0)).norm()
        floor = cancelled if name in ("dq", "dk") else right.numel() ** 0.5
        assert error <= tolerance * (right.masked_fill(empty, 0).norm() + floor), (name, float(error))
