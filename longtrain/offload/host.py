"""The host tier: an arena of memory beside the device's. On a CPU machine it is a second arena of the same memory."""

from __future__ import annotations

import ctypes
import queue
import weakref
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longtrain.offload.checksum import check, checksum
from longtrain.offload.regions import ALIGNMENT, Regions, padded
from longtrain.offload.system import System


class Copies(Protocol):
    """Between the device and memory that the system can do input and output on."""

    def pin(self, memory: np.ndarray) -> None:
        """Make `memory` fit for fast copies, for as long as it lives. Raises RuntimeError."""

    def unpin(self, memory: np.ndarray) -> None: ...

    def lead(self, payload: Tensor) -> int:
        """How far into a page of memory `payload` begins, where a disk is to take the pages themselves; else 0."""

    def buffer(self, nbytes: int, lead: int) -> Tensor:
        """``[nbytes]`` uint8 on the device, for what is fetched; what has a lead begins as far into a page as its source did."""

    def reach(self, block: Tensor, before: int, *, write: bool) -> np.ndarray | None:
        """The pages of memory that hold `block`, `before` bytes into the first, for a disk to write (else to fill); None: it cannot."""

    def mark(self) -> Any:
        """Called where a transfer is asked for: what must have happened on the device before its copies start."""

    def down(self, target: np.ndarray, source: Tensor, mark: Any) -> None:
        """Bytes from the device; done when it returns. Called in a thread."""

    def up(self, target: Tensor, source: np.ndarray, mark: Any) -> None:
        """Bytes to the device; done when it returns. Called in a thread."""


class CpuCopies:
    """The device is the CPU. Memory of what was fetched is used again, up to `keep` bytes of it: fresh pages cost more than the disk."""

    def __init__(self, system: System, keep: int) -> None:
        self._system, self._keep = system, keep
        self._idle: list[np.ndarray] = []
        self._returned: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()  # the last tensor may go in any thread, or in the midst of us

    def pin(self, memory: np.ndarray) -> None: ...

    def unpin(self, memory: np.ndarray) -> None: ...

    def lead(self, payload: Tensor) -> int:
        address = payload.data_ptr()
        wanted = self._system.device_memory and payload.nbytes >= self._system.least_in_place and address % 8 == 0
        return address % ALIGNMENT if wanted else 0

    def buffer(self, nbytes: int, lead: int) -> Tensor:
        size = padded(lead + nbytes)
        while not self._returned.empty():
            self._idle.append(self._returned.get())
        at = next((i for i, memory in enumerate(self._idle) if memory.nbytes == size), None)
        if at is None:
            memory = np.empty(size + ALIGNMENT, np.uint8)
            memory = memory[-memory.ctypes.data % ALIGNMENT :][:size]
        else:
            memory = self._idle.pop(at)
        while sum(m.nbytes for m in self._idle) > self._keep:
            self._idle.pop(0)
        lent = memory[:]
        weakref.finalize(lent, self._back, memory).atexit = False
        return torch.from_numpy(lent)[lead : lead + nbytes]

    def _back(self, memory: np.ndarray) -> None:
        """The last tensor that used it is gone."""
        if (self._returned.qsize() + 1) * memory.nbytes <= self._keep:
            self._returned.put(memory)

    def reach(self, block: Tensor, before: int, *, write: bool) -> np.ndarray | None:
        start, size = block.data_ptr() - before, padded(before + block.nbytes)
        if not self._system.device_memory or start % ALIGNMENT:
            return None
        first = block.untyped_storage().data_ptr()
        if not write and (start < first or start + size > first + block.untyped_storage().nbytes()):
            return None
        # Of a source, the neighbours' bytes in its first and last page go to the disk too: that memory is there, and nobody reads them
        # back.
        return np.frombuffer((ctypes.c_char * size).from_address(start), np.uint8)

    def mark(self) -> None: ...

    def down(self, target: np.ndarray, source: Tensor, mark: None) -> None:
        self._system.copy(target, source.numpy())

    def up(self, target: Tensor, source: np.ndarray, mark: None) -> None:
        self._system.copy(target.numpy(), source)


def copies_for(device: torch.device, system: System, staging_bytes: int) -> Copies:
    if device.type == "cpu":
        return CpuCopies(system, staging_bytes // 4)
    if device.type == "cuda":
        from longtrain.offload.cuda import CudaCopies

        return CudaCopies(device, system)
    raise ValueError(f"offload serves cpu and cuda devices, found {device}; leave memory.host_budget and memory.disk out")


class HostTier:
    """`nbytes` of memory, exactly, taken at once and touched as it fills."""

    name = "host"
    setting = "memory.host_budget"

    def __init__(self, nbytes: int, system: System, copies: Copies) -> None:
        self.regions = Regions(nbytes, 64)
        try:
            self._arena = system.allocate(nbytes)
            copies.pin(self._arena)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"memory.host_budget: {nbytes:,} bytes cannot be had ({error}); lower it") from error
        self._copies = copies
        self.close = weakref.finalize(self, copies.unpin, self._arena)
        """At the latest when the tier, and the last transfer that holds it, are gone."""

    def write(self, offset: int, source: Tensor, mark: Any, extent: int) -> int:
        """One block; the checksum of what arrived."""
        data = self._arena[offset : offset + source.nbytes]
        self._copies.down(data, source, mark)
        return checksum(data, extent, offset)

    def read(self, offset: int, target: Tensor, mark: Any, extent: int, expected: int | None) -> None:
        """One block. Raises ChecksumError."""
        data = self._arena[offset : offset + target.nbytes]
        check(data, extent, offset, expected)
        self._copies.up(target, data, mark)
