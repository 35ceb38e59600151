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


def refuse_device(device: torch.device) -> str | None:
    """Why Triton kernels do not run there, or None."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"GPU kernels: the tensors are on {device.type}"
    if MISSING is not None:
        return MISSING
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no GPU on this machine"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than sm_80"
    return None
