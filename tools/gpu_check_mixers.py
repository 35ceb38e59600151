"""Long convolution and linear attention for gpu_check.py: every backend against float64, then time and memory against plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from bench_long_conv import torch_fft
from gpu_check_shapes import Row, Sizes, relative
from step_process import memory
from torch import Tensor

from longtrain.ops.linear_attention import BACKENDS as LINEAR_BACKENDS
from longtrain.ops.linear_attention import explain as explain_linear
from longtrain.ops.linear_attention import linear_attention
from longtrain.ops.long_conv import explain as explain_conv
from longtrain.ops.long_conv import long_conv
from longtrain.ops.long_conv.interface import BACKENDS as CONV_BACKENDS

# Some 15 independent roundings on the way of a result, of the dtype's unit; three tf32 products of float32 leave 2^-21.
CONV_ERROR = {torch.float32: 15**0.5 * 2**-21, torch.bfloat16: 15**0.5 * 2**-8, torch.float16: 15**0.5 * 2**-11}
LINEAR_ERROR = {torch.float32: 2e-5, torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps}
"""Of 16 bits one rounding of the result, and one of the gradient that comes in; of float32 the delta rule's triangular systems."""


def outcome(call: Callable[..., Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Output and gradients of the inputs, for an upstream gradient that is the same in every dtype."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = call(**leaves)
    upstream = torch.linspace(-1, 2, out.numel(), device=out.device).cos().to(torch.bfloat16).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), upstream)]


def worst(ours: list[Tensor], exact: list[Tensor]) -> float:
    return max(relative(a, b) for a, b in zip(ours, exact, strict=True))


def conv_inputs(T: int, E: int, W: int, H: int, dtype: torch.dtype, device: str, every: bool) -> dict[str, Tensor]:
    """u, k and, with `every`, skip and gates; k and skip in float32."""
    g = torch.Generator().manual_seed(T)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    found = {"u": normal(1, T, E, dtype=dtype), "k": normal(H, W) / W**0.5}
    if every:
        found |= {"skip": normal(E), "gate_in": normal(1, T, E, dtype=dtype), "gate_out": normal(1, T, E, dtype=dtype)}
    return found


def conv_rows(sizes: Sizes) -> Iterator[Row]:
    """Every backend that takes a call, against torch.fft in float64 (itself held to the definition by the tests)."""
    T, device = sizes.conv_tokens[0], sizes.device
    third, long = T // 3, 4 * T + 1
    edges = torch.tensor([0, third, third + 1, T + 7])
    cases = {
        "one token": (1, 1, {}, True),
        "causal": (T, T, {}, False),
        "odd, two-sided": (T + 7, T + 7, {"causal": False}, True),
        "documents": (T + 7, T, {"cu_seqlens": edges}, True),
        "a filter of 100 taps": (long, 100, {}, False),
        "order 3": (long, long, {}, False),
    }
    for case, (tokens, W, options, every) in cases.items():
        for dtype in (torch.float32, torch.bfloat16):
            inputs = conv_inputs(tokens, 8, W, 4 if every else 8, dtype, device, every)
            exact = outcome(lambda **x: long_conv(**x, **options, backend="fft"), {name: x.double() for name, x in inputs.items()})
            reasons = explain_conv(**inputs, **options)
            for backend in (name for name in CONV_BACKENDS if name != "reference" and reasons[name] is None):
                error = worst(outcome(lambda **x: long_conv(**x, **options, backend=backend), inputs), exact)
                yield Row(section="long conv", name=f"{case}, {str(dtype)[6:]}: {backend}", measured=f"{error:.1e}",
                          expected=f"at most {CONV_ERROR[dtype]:.1e}", passed=error <= CONV_ERROR[dtype])


LINEAR_KINDS = {
    "plain": (None, False),
    "head": (1, False),
    "feature": (2, False),
    "delta": (None, True),
    "gated delta": (1, True),
    "feature, delta": (2, True),
}


def linear_inputs(sizes: Sizes, T: int, kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    forget, delta = LINEAR_KINDS[kind]
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, T, sizes.state_heads, *shape, generator=g)

    D = sizes.state_dim
    found = {"q": normal(D), "k": F.normalize(normal(D), dim=-1), "v": normal(D)}
    if forget is not None:
        found["decay"] = -0.05 * normal(*([D] if forget == 2 else [])).exp()
    if delta:
        found["beta"] = normal().sigmoid()
    return {name: x.to(sizes.device, dtype) for name, x in found.items()}


def linear_rows(sizes: Sizes) -> Iterator[Row]:
    """Every backend against the recurrence in float64."""
    T = sizes.state_tokens // 64 + 3
    edges = torch.tensor([0, T // 3, T // 3 + 1, T])
    for kind in LINEAR_KINDS:
        for dtype, allowed in LINEAR_ERROR.items():
            inputs = linear_inputs(sizes, T, kind, dtype)
            exact = outcome(
                lambda **x: linear_attention(**x, cu_seqlens=edges, backend="reference"), {name: x.double() for name, x in inputs.items()}
            )
            reasons = explain_linear(**inputs)
            for backend in (name for name in LINEAR_BACKENDS if name != "reference" and reasons[name] is None):
                error = worst(outcome(lambda **x: linear_attention(**x, cu_seqlens=edges, backend=backend), inputs), exact)
                yield Row(
                    section="linear",
                    name=f"{kind}, {str(dtype)[6:]}: {backend}",
                    measured=f"{error:.1e}",
                    expected=f"at most {allowed:.1e}",
                    passed=error <= allowed,
                )


# --- speed and memory ------------------------------------------------------------------------------------------------------------


def taken(sizes: Sizes, call: Callable[..., Tensor], inputs: dict[str, Tensor]) -> tuple[float, float]:
    """(seconds, bytes beyond inputs, output and gradients) of a forward and backward."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    upstream = torch.ones_like(call(**inputs))

    def step() -> None:
        torch.autograd.grad(call(**leaves), list(leaves.values()), upstream)

    time = sizes.fastest(step)
    held = sum(x.numel() * x.element_size() for x in (upstream, *inputs.values()))
    return time, max(0, memory(step, torch.device(sizes.device))["peak"] - held)


def conv_speed_rows(sizes: Sizes) -> Iterator[Row]:
    """bf16, one sequence, filters as long as it; torch.fft has its tensors channel by channel, as it likes them."""
    for T in sizes.conv_tokens:
        inputs = conv_inputs(T, sizes.conv_width, T, sizes.conv_width, torch.bfloat16, sizes.device, False)
        edges = torch.tensor([0, T])
        theirs = {"u": inputs["u"].transpose(1, 2).contiguous(), "k": inputs["k"]}
        time, held = taken(sizes, lambda u, k: torch_fft(u, k, None, None, edges), theirs)
        ours, room = taken(sizes, long_conv, inputs)
        chosen = next(name for name, why in explain_conv(**inputs).items() if why is None)
        yield Row(section="conv speed", name=f"{chosen}, T {T:,}, E {sizes.conv_width}",
                  measured=f"{1e3 * ours:.2f} ms ({time / ours:.1f}x), {room / 1e6:.0f} MB ({room / max(1, held):.2f}x)",
                  expected=f"4x of torch.fft's {1e3 * time:.2f} ms, 0.25x of {held / 1e6:.0f} MB",
                  passed=sizes.judged(chosen == "triton" and time >= 4 * ours and room <= held / 4))


def linear_speed_rows(sizes: Sizes) -> Iterator[Row]:
    """bf16; against the same by chunks in plain torch."""
    for kind in LINEAR_KINDS:
        inputs = linear_inputs(sizes, sizes.state_tokens, kind, torch.bfloat16)
        time, held = taken(sizes, lambda **x: linear_attention(**x, backend="chunked"), inputs)
        ours, room = taken(sizes, linear_attention, inputs)
        chosen = next(name for name, why in explain_linear(**inputs).items() if why is None)
        yield Row(
            section="linear speed",
            name=f"{kind}: {chosen}, T {sizes.state_tokens:,}, H {sizes.state_heads}, D {sizes.state_dim}",
            measured=f"{1e3 * ours:.2f} ms ({time / ours:.1f}x), {room / 1e6:.0f} MB ({room / max(1, held):.2f}x)",
            expected=f"torch by chunks: {1e3 * time:.2f} ms, {held / 1e6:.0f} MB",
            passed=sizes.judged(chosen == "triton" and ours <= time and room <= held),
        )
