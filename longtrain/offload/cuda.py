"""Copies between a GPU and the host's memory, on streams of their own. Called from the store's threads; each call ends when its copy has.

The order that is kept: what was queued on the caller's stream when the transfer was asked for (the kernels that fill a source, or that
used the memory of a target before) comes before the copy, by an event; the copy comes before whatever the caller does with its result,
because the thread waits for the copy and the store for the thread.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from longtrain.offload.system import System


class CudaCopies:
    def __init__(self, device: torch.device, system: System) -> None:
        self._device, self._system = device, system
        self._down, self._up = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def pin(self, memory: np.ndarray) -> None:
        """Registered at its exact size: the caching pinned allocator would round up to a power of two."""
        status = int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
        if status:
            raise RuntimeError(f"cudaHostRegister of {memory.nbytes:,} bytes: CUDA error {status}")

    def unpin(self, memory: np.ndarray) -> None:
        status = int(torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data))
        if status:
            raise RuntimeError(f"cudaHostUnregister: CUDA error {status}")

    def lead(self, payload: Tensor) -> int:
        return 0

    def buffer(self, nbytes: int, lead: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def reach(self, block: Tensor, before: int, *, write: bool) -> None:
        """Never: a disk takes the host's memory."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def down(self, target: np.ndarray, source: Tensor, mark: torch.cuda.Event) -> None:
        self._copy(self._down, torch.from_numpy(target), source, mark)

    def up(self, target: Tensor, source: np.ndarray, mark: torch.cuda.Event) -> None:
        self._copy(self._up, target, torch.from_numpy(source), mark)

    def _copy(self, stream: torch.cuda.Stream, target: Tensor, source: Tensor, mark: torch.cuda.Event) -> None:
        with torch.cuda.stream(stream):
            if self._system.honours("computed"):
                stream.wait_event(mark)
            self._system.delay()
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        if self._system.honours("copied"):
            done.synchronize()
