"""What gpu_check.py's rows are made of: a row, and how large everything is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from step_process import seconds
from torch import Tensor

SHAPE_8B = dict(hidden=4096, ffn=14336, vocab=128256, heads=32, kv_heads=8, layers=32)
TINY = dict(hidden=32, ffn=64, vocab=64, heads=4, kv_heads=2, layers=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing checked. `passed`: None where nothing was judged."""

    section: str
    name: str
    measured: str = ""
    expected: str = ""
    passed: bool | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large everything is: a GPU's, or tiny ones that exercise the code on a CPU."""

    device: str
    judge_speed: bool
    matmul: int
    copy_bytes: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    square: int
    """Tokens of the attention square that libraries are compared on."""
    chunk: int
    offset: int
    shape: dict
    """The 8B shape, whole and layer by layer."""
    layer_tokens: int
    layer_chunks: tuple[int, ...]
    long_tokens: int
    model_tokens: int
    conv_tokens: tuple[int, ...]
    conv_width: int
    state_tokens: int
    state_heads: int
    state_dim: int
    step: dict = field(default_factory=dict)
    budget: str = "40GiB"
    repeats: int = 5

    @classmethod
    def gpu(cls) -> Sizes:
        return cls(device="cuda", judge_speed=True, matmul=8192, copy_bytes=4 << 30, tokens=2048, heads=32, kv_heads=8, head_dim=128,
                   square=16384, chunk=16384, offset=114688, shape=SHAPE_8B, layer_tokens=131072, layer_chunks=(4096, 8192, 16384),
                   long_tokens=1 << 20, model_tokens=65536, conv_tokens=(16384, 32768, 65536, 131072, 262144), conv_width=256,
                   state_tokens=32768, state_heads=16, state_dim=64,
                   step=dict(layers=2, hidden=4096, ffn=14336, vocab=32768, heads=32, kv_heads=8, tokens=65536, chunk=8192))

    @classmethod
    def tiny_cpu(cls) -> Sizes:
        return cls(device="cpu", judge_speed=False, matmul=64, copy_bytes=1 << 16, tokens=160, heads=4, kv_heads=2, head_dim=16, square=96,
                   chunk=64, offset=192, shape=TINY, layer_tokens=256, layer_chunks=(32, 64), long_tokens=512, model_tokens=128,
                   conv_tokens=(96, 200), conv_width=8, state_tokens=512, state_heads=2, state_dim=16, repeats=1,
                   step=dict(layers=2, hidden=32, ffn=64, vocab=64, heads=4, kv_heads=2, tokens=256, chunk=64), budget="1GiB")

    def judged(self, passed: bool) -> bool | None:
        """A verdict on speed or memory; none where figures mean nothing."""
        return passed if self.judge_speed else None

    def fastest(self, call: Callable[[], object]) -> float:
        """Seconds of the best of `repeats` calls after one that warms up."""
        call()
        return min(seconds(call, torch.device(self.device)) for _ in range(self.repeats))

    def lacks(self, needed: int) -> str | None:
        """Why `needed` bytes are not to be had on the GPU, or None."""
        if self.device != "cuda":
            return None
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return None if needed <= free else f"skipped: needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def relative(a: Tensor, b: Tensor) -> float:
    error = ((a.double() - b.double()).norm() / b.double().norm()).item()
    return error if error == error else float("inf")
