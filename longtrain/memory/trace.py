"""When memory was given out and taken back: a row for every event, from the allocators themselves, or from the storages of tensors.

A trace is an int64 array ``[events, 4]``: nanoseconds of `time.perf_counter_ns`, address, bytes (negative where given back), device (-1 for
the CPU, else the GPU's number). The position of an event in it is the clock of the whole profile: what was seen between two operations
lies between two positions.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from array import array
from functools import partial

import numpy as np
import torch
from torch import Tensor

from longtrain._extension import MISSING

COLUMNS = ("nanoseconds", "address", "bytes", "device")


def missing() -> str | None:
    """Why the allocators cannot be asked, or None."""
    if MISSING is not None:
        return MISSING
    if not hasattr(torch.ops.longtrain, "_memory_trace_begin"):
        return "the C++ extension is older than this code; build it again with `pip install -e . --no-build-isolation`"
    return None


class AllocatorTrace:
    """What torch's allocators report, of this thread and of the backward passes that it starts (csrc/memory_trace.cpp): kernels' own
    scratch tensors too. Blocks that were taken before `begin` are not in it."""

    def __init__(self) -> None:
        if (why := missing()) is not None:
            raise ValueError(f"the allocators cannot be traced: {why}")
        try:
            address = torch.ops.longtrain._memory_trace_begin()
        except RuntimeError as error:
            raise RuntimeError(f"memory cannot be profiled now: {str(error).splitlines()[0]}") from None
        self._counter = ctypes.c_int64.from_address(address)

    @property
    def count(self) -> int:
        """Events so far."""
        return self._counter.value

    def saw(self, tensor: Tensor) -> None:
        """Nothing to learn from a tensor."""

    def end(self) -> np.ndarray:
        return torch.ops.longtrain._memory_trace_end().numpy()


class StorageTrace:
    """What can be known where the extension is not built: the storages of the tensors that operations give out, each by a weak reference
    that says when it is gone. Scratch memory inside a kernel is not seen."""

    def __init__(self) -> None:
        self._events = array("q")
        self._alive: dict[int, weakref.ref] = {}

    @property
    def count(self) -> int:
        return len(self._events) // len(COLUMNS)

    def saw(self, tensor: Tensor) -> None:
        """A tensor that may lie in a storage not seen before."""
        if (found := storage_of(tensor)) is None:
            return
        storage, address, nbytes, device = found
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, partial(self._gone, key, address, nbytes, device))
            self._events.extend((time.perf_counter_ns(), address, nbytes, device))

    def _gone(self, key: int, address: int, nbytes: int, device: int, _: weakref.ref) -> None:
        if self._alive.pop(key, None) is not None:
            self._events.extend((time.perf_counter_ns(), address, -nbytes, device))

    def end(self) -> np.ndarray:
        self._alive.clear()
        return np.array(self._events, dtype=np.int64).reshape(-1, len(COLUMNS))


def storage_of(tensor: Tensor) -> tuple[torch.UntypedStorage, int, int, int] | None:
    """(storage, address, bytes, device as in a trace) of a tensor's memory, of a distributed tensor's own part; None where it has none."""
    tensor = getattr(tensor, "_local_tensor", tensor)
    if tensor.device.type not in ("cpu", "cuda") or tensor.layout is not torch.strided:
        return None
    try:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
    except (NotImplementedError, RuntimeError):  # a tensor subclass or a functorch wrapper without memory of its own
        return None
    if not address or not storage.nbytes():
        return None
    return storage, address, storage.nbytes(), tensor.device.index or 0 if tensor.device.type == "cuda" else -1
