"""Speed of attention for gpu_check.py: ceilings of the machine, every backend on a square, a chunk at an offset as dispatched."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from gpu_check_shapes import Row, Sizes
from step_process import seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longtrain.ops.attention import attention, attention_backward, explain
from longtrain.ops.attention.select import BACKENDS

PUBLISHED = {
    "SDPA flash": (304, None),
    "cudnn": (566, 470),
    "flash": (306, 166),
    "flash_attn_2": (306, 166),
    "flash_attn_3": (621, 575),
    "triton": (420, None),
}
"""TFLOP/s forward, backward on an H100, D128 causal, 8K to 16K; for `triton` what is asked of it."""


def ceiling_rows(sizes: Sizes) -> Iterator[Row]:
    """What this machine gives at best: the scale that other rows are read on."""
    a, b = (torch.randn(sizes.matmul, sizes.matmul, device=sizes.device).to(torch.bfloat16) for _ in range(2))
    rate = 2 * sizes.matmul ** 3 / sizes.fastest(lambda: a @ b) / 1e12
    yield Row(section="ceilings", name=f"bf16 matmul, {sizes.matmul} cubed", measured=f"{rate:.1f} TFLOP/s")
    source = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=sizes.device)
    copy = torch.empty_like(source)
    rate = 2 * sizes.copy_bytes / sizes.fastest(lambda: copy.copy_(source)) / 1e12
    yield Row(section="ceilings", name="copy on the device, read and written", measured=f"{rate:.2f} TB/s")
    host = torch.empty(sizes.copy_bytes, dtype=torch.uint8, pin_memory=sizes.device == "cuda")
    for name, to, of in (("host to device", source, host), ("device to host", host, source)):
        rate = sizes.copy_bytes / sizes.fastest(lambda: to.copy_(of, non_blocking=True)) / 1e9
        yield Row(section="ceilings", name=f"pinned copy, {name}", measured=f"{rate:.1f} GB/s")


def tensors(sizes: Sizes, queries: int, keys: int) -> tuple[Tensor, ...]:
    """q, k, v, dout in bf16."""
    shapes = ((queries, sizes.heads), (keys, sizes.kv_heads), (keys, sizes.kv_heads), (queries, sizes.heads))
    return tuple(torch.randn(1, n, h, sizes.head_dim, device=sizes.device).to(torch.bfloat16) for n, h in shapes)


def rates(sizes: Sizes, backend: str, q, k, v, dout) -> tuple[float, float, float]:
    """TFLOP/s forward and backward by the pair of functions that streaming calls, and the seconds of the first forward."""
    found: list[tuple[Tensor, Tensor]] = []
    options = dict(causal=True, backend=backend, kernel_fallback="warn")
    first = seconds(lambda: found.append(attention(q, k, v, return_lse=True, **options)), torch.device(sizes.device))
    out, lse = found.pop()
    forward = sizes.fastest(lambda: attention(q, k, v, return_lse=True, **options))
    dk, dv = (torch.zeros(x.shape, device=x.device) for x in (k, v))
    backward = sizes.fastest(lambda: attention_backward(dout, q, k, v, out, lse, dk=dk, dv=dv, **options))
    T, S = q.shape[1], k.shape[1]
    flop = 4 * sizes.heads * sizes.head_dim * T * (S - T + (T + 1) / 2) / 1e12
    return flop / forward, 2.5 * flop / backward, first


def sdpa_rates(sizes: Sizes, q, k, v, dout) -> tuple[float, float]:
    """torch's own on its flash kernel (on a CPU whatever torch chooses), forward and backward."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def run() -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), is_causal=True, enable_gqa=True)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if sizes.device == "cuda" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        forward = sizes.fastest(run)
        out, upstream = run(), dout.transpose(1, 2)
        backward = sizes.fastest(lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True))
    flop = 2 * sizes.heads * sizes.head_dim * q.shape[1] * (q.shape[1] + 1) / 1e12
    return flop / forward, 2.5 * flop / backward


def both(forward: float, backward: float) -> float:
    """TFLOP/s of a forward and a backward together."""
    return 3.5 / (1 / forward + 2.5 / backward)


def attention_speed_rows(sizes: Sizes) -> Iterator[Row]:
    """A square by torch and by every backend that takes it; then a chunk at an offset as it is dispatched."""
    q, k, v, dout = tensors(sizes, sizes.square, sizes.square)
    torchs = sdpa_rates(sizes, q, k, v, dout)

    def speed(name: str, forward: float, backward: float, passed: bool | None = None, note: str = "", expected: str = "") -> Row:
        published = [f"{rate} {way}" for rate, way in zip(PUBLISHED.get(name, (None, None)), ("fwd", "bwd")) if rate]
        return Row(section="attn speed", name=f"{name}, square {sizes.square:,}", measured=f"{forward:.0f} fwd, {backward:.0f} bwd TFLOP/s",
                   expected=expected or (f"{', '.join(published)} on an H100" if published else ""), passed=passed, note=note)

    yield speed("SDPA flash", *torchs)
    refusals = explain(q, k, v, causal=True).refusals
    squares = {"SDPA flash": torchs}
    for name in (n for n in BACKENDS if n not in ("reference", "tiled")):
        if name in refusals:
            yield Row(section="attn speed", name=f"{name}, square {sizes.square:,}", note=f"refuses: {refusals[name]}")
            continue
        forward, backward, first = rates(sizes, name, q, k, v, dout)
        squares[name] = forward, backward
        note = f"{both(forward, backward) / both(*torchs):.2f}x of SDPA flash, forward + backward; first call {first:.1f} s"
        good = forward >= 420 and both(forward, backward) >= both(*torchs)
        yield speed(name, forward, backward, sizes.judged(good) if name == "triton" else None, note,
                    "420 fwd, fwd+bwd 1.0x of SDPA flash" if name == "triton" else "")
    best = [max(rate[way] for rate in squares.values()) for way in (0, 1)]
    tokens = sizes.chunk + sizes.offset
    q, k, v, dout = tensors(sizes, sizes.chunk, tokens)
    forward, backward, first = rates(sizes, "auto", q, k, v, dout)
    yield Row(
        section="attn speed",
        name=f"chunk of {sizes.chunk:,} at offset {sizes.offset:,}, {explain(q, k, v, causal=True).chosen}",
        measured=f"{forward:.0f} fwd, {backward:.0f} bwd TFLOP/s",
        expected=f"{0.97 * best[0]:.0f}, {0.97 * best[1]:.0f} (0.97 of the best square)",
        passed=sizes.judged(forward >= 0.97 * best[0] and backward >= 0.97 * best[1]),
        note=f"first call {first:.1f} s",
    )
