"""What only the system knows, looked at every few milliseconds from a thread: resident memory, reserved memory, how full the tiers are."""

from __future__ import annotations

import ctypes
import threading
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch

from longtrain.offload import DeviceStore, TieredStore
from longtrain.offload.extent import Event

COLUMNS = ("nanoseconds", "used", "reserved", "host", "disk")
STATM = Path("/proc/self/statm")


class _Mallinfo(ctypes.Structure):
    """mallinfo2(3); `arena` and `hblkhd` together are what malloc has taken from the system."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


class Sampler:
    """`rows`: `COLUMNS` of each look, -1 for what this system does not say. `events`: transfers of the token stores."""

    def __init__(self, device: torch.device, every: float = 0.025) -> None:
        self.device, self.every = device, every
        self.rows = array("q")
        self.events: list[Event] = []
        self.stores: Sequence[DeviceStore | TieredStore] = ()
        """The token stores of this process."""
        self._mallinfo = _mallinfo() if device.type == "cpu" else None
        self._page = ctypes.CDLL(None).getpagesize() if STATM.exists() else 0
        self._began, self._last = time.perf_counter(), {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="longtrain memory", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        self.look()

    def _watch(self) -> None:
        while not self._over.wait(self.every):
            self.look()

    def look(self) -> None:
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            used, reserved = total - free, torch.cuda.memory_reserved(self.device)
        else:
            used = int(STATM.read_text().split()[1]) * self._page if self._page else -1
            reserved = -1
            if self._mallinfo is not None:
                info = self._mallinfo()
                reserved = info.arena + info.hblkhd
        tiers = {"host": 0, "disk": 0}
        for store in self.stores:
            if isinstance(store, TieredStore):
                for tier, regions in store.regions.items():
                    tiers[tier] += regions.used
                self._take_events(store)
        self.rows.extend((time.perf_counter_ns(), used, reserved, tiers["host"], tiers["disk"]))

    def _take_events(self, store: TieredStore) -> None:
        last, new = self._last.get(id(store), self._began), []
        for event in reversed(store.events.copy()):
            if event.seconds <= last:
                break
            new.append(event)
        if new:
            self._last[id(store)] = new[0].seconds
            self.events += reversed(new)


def _mallinfo():
    """glibc's mallinfo2, or None where the C library is another one."""
    found = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if found is not None:
        found.restype = _Mallinfo
    return found
