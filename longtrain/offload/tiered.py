"""The token store over three tiers: device, host, disk.

put is write-behind: it returns at once, keeps the source until its bytes are in their tier, and forwards the source to who asks before.
get fetches, joins and cuts; prefetch says what will be asked for, and that is fetched ahead as staging allows.

Every change of state happens in a call of the store, never in a thread: threads move blocks of bytes and hand them back (`System`). So
an in-place edit of a source cannot slip between the look at its version counter and the end of its write, and a test can run any order
of transfers there is.

Every wait has an end (`System.least_bandwidth`).
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Hashable, Iterable
from typing import NoReturn

import torch
from torch import Tensor

from longtrain.offload.extent import State
from longtrain.offload.place import DEVICE, DiskSettings, Place
from longtrain.offload.residence import Kept, Residence
from longtrain.offload.store import check_put, covering, inside, join
from longtrain.offload.system import System
from longtrain.span import Span


class TieredStore:
    """See the module. `staging_bytes` bounds what is on its way to or from a tier, a single larger extent excepted: a quarter is the slab
    of a disk, the rest is for writes and for what is fetched ahead, half each. Raises ValueError where a tier cannot be made."""

    def __init__(
        self,
        device: torch.device | str,
        *,
        host_bytes: int = 0,
        disk: DiskSettings | None = None,
        staging_bytes: int = 128 << 20,
        system: System | None = None,
        events: int = 1 << 14,
    ) -> None:
        self.device = torch.device(device)
        system = system or System()
        self._residence = Residence(self.device, host_bytes, disk, staging_bytes, system, events)
        self._traffic = self._residence.traffic
        weakref.finalize(self, system.stop)  # the threads of a store that nobody closed end with it, or with the interpreter
        self.stats, self.events = self._residence.stats, self._residence.events
        self.regions = {name: tier.regions for name, tier in self._traffic.tiers.items()}
        """How full each tier is, and ever was."""
        self.block_bytes, self.staging = self._traffic.block_bytes, self._traffic.staging
        """Bytes for writes under way, and as many for what is fetched ahead; what a get waits for comes on top."""
        self._lock = threading.Lock()
        self._extents: dict[Hashable, dict[Span, Kept]] = {}
        self._released: deque[tuple[Hashable, Span | None]] = deque()
        self._closed = False

    def __deepcopy__(self, memo: dict) -> TieredStore:
        """Itself: a copied model uses the same tiers, and no name of its tensors is one of the other's."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model that offloads holds open tiers, which cannot be saved: save its state_dict(), or undo() the report first")

    def put(self, name: Hashable, span: Span, tensor: Tensor, place: Place = DEVICE) -> None:
        with self._lock:
            self._tidy()
            extents = self._extents.get(name, {})
            check_put(name, span, tensor, extents)
            kept = self._residence.keep(f"{name} at {span}", tensor, place)
            self._extents.setdefault(name, {})[span] = kept
            self._residence.warn()

    def get(self, name: Hashable, span: Span) -> Tensor:
        with self._lock:
            self._tidy()
            extents = self._extents.get(name, {})
            found = [(extents[s], part) for s, part in covering(name, extents, span)]
            for kept, _ in found:
                self._residence.fetch(kept.extent)  # all at once
            pieces = [(self._residence.take(kept), part) for kept, part in found]
            self._residence.advance()
            return join(pieces)

    def prefetch(self, order: Iterable[tuple[Hashable, Span]], *, first: bool = False) -> None:
        with self._lock:
            self._tidy()
            announced = []
            for name, span in order:
                extents = self._extents.get(name, {})
                spans = [span] if span in extents else sorted(s for s in extents if len(s & span))
                announced += [extents[at].extent for at in spans]
            self._residence.announce(announced, first=first)

    def release(self, name: Hashable, span: Span | None = None) -> None:
        # An owner may go at any time, in any thread, in the middle of a call of ours: then the call after it forgets.
        self._released.append((name, span))
        if self._lock.acquire(blocking=False):
            try:
                self._forget_released()
            finally:
                self._lock.release()

    def settle(self) -> None:
        """Wait until everything that is on its way has arrived."""
        with self._lock:
            self._tidy()
            self._traffic.absorb_until("idle", lambda: not self._traffic.moving)

    def names(self) -> list[Hashable]:
        """The names that hold extents now; empty when every step cleaned up after itself."""
        with self._lock:
            self._forget_released()
            return list(self._extents)

    def held(self) -> list[tuple[Hashable, Span, Tensor]]:
        """What was put and is on the device still, by name and span: for the memory profiler."""
        with self._lock:
            return [
                (name, span, kept.extent.payload)
                for name, extents in self._extents.items()
                for span, kept in extents.items()
                if kept.extent.state in (State.RESIDENT, State.WRITING)
            ]

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._released.extend((name, None) for name in self._extents)
            self._forget_released()
            self._traffic.close()
            self._closed = True

    def _tidy(self) -> None:
        """What happened since the last call: transfers that are done, owners that went, errors that nobody was told of."""
        if self._closed:
            raise RuntimeError("the store is closed; make another one")
        self._traffic.poll()
        self._forget_released()
        self._residence.warn()
        self._residence.raise_lost()

    def _forget_released(self) -> None:
        while self._released:
            name, span = self._released.popleft()
            extents = self._extents.get(name, {})
            for gone in inside(extents, span):
                self._residence.let_go(extents.pop(gone).extent)
            if not extents:
                self._extents.pop(name, None)
