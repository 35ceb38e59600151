"""A call of a Triton kernel as data, and whether Triton kernels can run where tensors are."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch

MISSING = None if importlib.util.find_spec("triton") else "triton is not installed: pip install longtrain[gpu]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One kernel, its grid and all its arguments: it can be run, and compiled without a GPU."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        if 0 not in self.grid:
            self.kernel[self.grid](**self.arguments, **self.options)


def interpreted() -> bool:
    """Whether Triton was told to run kernels on the CPU, in NumPy: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def padded(dim: int) -> int:
    """The side of a tile that holds `dim`: a power of two, and no less than products of tiles take."""
    return max(16, 1 << (dim - 1).bit_length())


def refuse_kernels(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> str | None:
    """Why Triton kernels do not take tensors of `dtype` there, whose sums are `wide`, or None."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"GPU kernels: the tensors are on {device.type}"
    if MISSING is not None:
        return MISSING
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no GPU on this machine"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than sm_80"
    if wide == torch.float64:
        return "no float64"
    if dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter computes bfloat16 wrongly"
    return None
