"""The token store over three tiers: device, host, disk.

put is write-behind: it returns at once, keeps the source until its bytes are in their tier, and forwards the source to who asks before.
get fetches, joins and cuts; prefetch says what will be asked for, and that is fetched ahead as staging allows.

Every change of state happens in a call of the store, never in a thread: threads move blocks of bytes and hand them back (`System`). So
an in-place edit of a source cannot slip between the look at its version counter and the end of its write, and a test can run any order
of transfers there is.

A tier that cannot take an extent is replaced by the next higher one, with one warning; the source is still there. What cannot be read
back, or is not what was written, is an error: never zeros. Every wait has an end (`System.least_bandwidth`).
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Hashable, Iterable
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from longtrain.offload.extent import NEXT, Event, Extent, Form, State, Tier, pack
from longtrain.offload.place import DEVICE, DiskSettings, Place
from longtrain.offload.store import check_put, covering, edited, join, version_of
from longtrain.offload.system import System
from longtrain.offload.traffic import Traffic
from longtrain.span import Span


class _Kept(NamedTuple):
    extent: Extent
    form: Form | None
    """None: the payload is the tensor itself."""


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
        self._system = system or System()
        self._traffic = Traffic(self.device, host_bytes, disk, staging_bytes, self._system, self._arrived)
        self.stats = self._traffic.stats
        self.regions = {name: tier.regions for name, tier in self._traffic.tiers.items()}
        """How full each tier is, and ever was."""
        self.block_bytes, self.staging = self._traffic.block_bytes, self._traffic.staging
        """Bytes for writes under way, and as many for what is fetched ahead; what a get waits for comes on top."""
        self._lock = threading.Lock()
        self._extents: dict[Hashable, dict[Span, _Kept]] = {}
        self._same: dict[tuple, Extent] = {}
        self._order: deque[Extent] = deque()
        self._released: deque[tuple[Hashable, Span | None]] = deque()
        self._lost: list[Extent] = []
        self._writing = self._fetched = 0
        self._warning: str | None = None
        self._number = count()
        self._closed = False
        self.events: deque[Event] = deque(maxlen=events)
        """The latest transitions."""

    def put(self, name: Hashable, span: Span, tensor: Tensor, place: Place = DEVICE) -> None:
        with self._lock:
            self._tidy()
            extents = self._extents.get(name, {})
            check_put(name, span, tensor, extents)
            kept = self._keep(f"{name} at {span}", tensor, place)
            self._extents.setdefault(name, {})[span] = kept
            self._warn()

    def get(self, name: Hashable, span: Span) -> Tensor:
        with self._lock:
            self._tidy()
            extents = self._extents.get(name, {})
            found = [(extents[s], part) for s, part in covering(name, extents, span)]
            for kept, _ in found:
                self._fetch(kept.extent)  # all at once
            pieces = [(self._take(kept), part) for kept, part in found]
            self._advance()
            return join(pieces)

    def prefetch(self, order: Iterable[tuple[Hashable, Span]], *, first: bool = False) -> None:
        with self._lock:
            self._tidy()
            announced = []
            for name, span in order:
                extents = self._extents.get(name, {})
                for at in [span] if span in extents else sorted(s for s in extents if len(s & span)):
                    extent = extents[at].extent
                    if extent.state not in (State.RESIDENT, State.FAILED):
                        extent.queued += 1
                        announced.append(extent)
            if first:
                self._order.extendleft(reversed(announced))
            else:
                self._order.extend(announced)
            self._advance()

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

    def __del__(self) -> None:
        if system := getattr(self, "_system", None):
            system.stop()

    # --- calls: the lock is held ---------------------------------------------------------------------------------------------------

    def _keep(self, label: str, tensor: Tensor, place: Place) -> _Kept:
        below = self._traffic.tiers
        if place.tier not in ("device", *below):
            setting = {"host": "memory.host_budget", "disk": "memory.disk"}[place.tier]
            raise ValueError(f"{label}: {place} needs a tier that this run does not have; set {setting}")
        if tensor.device.type != self.device.type:
            raise ValueError(f"{label}: is on {tensor.device}, this store serves {self.device}; move the tensor")
        if not tensor.numel() or place == DEVICE:
            return _Kept(self._resident(label, tensor), None)
        payload, form = pack(tensor, place.compress)
        key = _same_bytes(tensor, payload, place)
        if key in self._same:
            extent = self._same[key]
            extent.holders += 1
            self.stats.deduplicated += 1
            return _Kept(extent, form)
        if place.tier == "device":
            return _Kept(self._resident(label, payload), form)
        self._traffic.wait("room", lambda: not self._writing or self._writing + payload.nbytes <= self.staging)
        extent = Extent(next(self._number), label, payload, version_of(payload), payload.nbytes)
        self._writing += extent.nbytes
        self.stats.most_writing = max(self.stats.most_writing, self._writing)
        candidates = ("disk", "host") if place.tier == "disk" else ("host",)
        self._write(extent, [below[name] for name in candidates if name in below])
        if key:
            extent.key = key
            self._same[key] = extent
        return _Kept(extent, form)

    def _resident(self, label: str, payload: Tensor) -> Extent:
        extent = Extent(next(self._number), label, payload, version_of(payload), payload.nbytes)
        self._move(extent, State.RESIDENT)
        return extent

    def _fetch(self, extent: Extent) -> None:
        """Begin to read what is in a tier alone."""
        if extent.state is State.READY and version_of(extent.payload) != extent.version:
            self._drop(extent)  # who was handed it before has edited it
        if extent.state is State.STORED:
            extent.payload = self._traffic.copies.buffer(extent.nbytes, extent.lead)
            self._fetched += extent.nbytes
            self.stats.most_fetched = max(self.stats.most_fetched, self._fetched)
            self._move(extent, State.READING)
            self._traffic.begin(extent, write=False)

    def _take(self, kept: _Kept) -> Tensor:
        extent = kept.extent
        self._fetch(extent)  # again: while others were waited for, its write may have ended, or its twin may have been taken
        self._traffic.wait("fetched", lambda: extent.state is not State.READING)
        if extent.state is State.FAILED:
            raise RuntimeError(str(extent.error)) from extent.error
        if extent.state in (State.RESIDENT, State.WRITING) and version_of(extent.payload) != extent.version:
            raise RuntimeError(edited(extent.label))
        if extent.state is State.WRITING:
            self.stats.forwarded += 1
        payload = extent.payload
        if extent.uses:
            extent.uses -= 1
        elif extent.queued:
            extent.queued -= 1
            self._order.remove(extent)
        if extent.state is State.READY and not extent.uses:
            self._drop(extent)
        return kept.form.restore(payload) if kept.form else payload

    def _advance(self) -> None:
        """Fetch ahead, in the announced order, what staging has room for."""
        while self._order:
            extent = self._order[0]
            if extent.state is State.STORED:
                if self._fetched and self._fetched + extent.nbytes > self.staging:
                    return
                self._fetch(extent)
            self._order.popleft()
            extent.queued -= 1
            if extent.state in (State.WRITING, State.READING, State.READY):
                extent.uses += 1

    def _tidy(self) -> None:
        """What happened since the last call: transfers that are done, owners that went, errors that nobody was told of."""
        if self._closed:
            raise RuntimeError("the store is closed; make another one")
        self._traffic.poll()
        self._forget_released()
        self._warn()
        lost, self._lost = [e for e in self._lost if e.state is State.FAILED], []
        if lost:
            raise RuntimeError(str(lost[0].error))

    def _warn(self) -> None:
        """Once in the store's life, from the caller's thread."""
        if self._warning:
            text, self._warning = self._warning, ""
            warnings.warn(text, RuntimeWarning, stacklevel=4)

    def _forget_released(self) -> None:
        while self._released:
            name, span = self._released.popleft()
            extents = self._extents.get(name, {})
            for gone in [s for s in extents if span is None or len(s & span) == len(s)]:
                self._let_go(extents.pop(gone).extent)
            if not extents:
                self._extents.pop(name, None)

    def _let_go(self, extent: Extent) -> None:
        extent.holders -= 1
        if extent.holders:
            return
        if extent.state in (State.READING, State.READY):
            self._fetched -= extent.nbytes
        self._same.pop(extent.key, None)
        self._move(extent, State.RELEASED)
        extent.payload = None
        self._traffic.leave(extent)

    def _drop(self, extent: Extent) -> None:
        self._fetched -= extent.nbytes
        extent.payload = None
        self._move(extent, State.STORED)

    # --- transfers -----------------------------------------------------------------------------------------------------------------

    def _write(self, extent: Extent, tiers: list[Tier]) -> None:
        """Begin to write to the first of `tiers` that has room; on the device where none has."""
        cause = None
        for tier in tiers:
            refused = self._traffic.take_room(tier, extent)
            if refused is None:
                self._move(extent, State.WRITING)
                if cause:
                    self._degraded(extent, cause)
                self._traffic.begin(extent, write=True)
                if not self._system.honours("written"):
                    self._written(extent)
                return
            cause = cause or refused
        self._writing -= extent.nbytes
        self._move(extent, State.RESIDENT)
        self._degraded(extent, cause)

    def _arrived(self, extent: Extent, write: bool) -> None:
        """All blocks of an extent are where they belong, or one has failed."""
        if extent.state is State.RELEASED:
            self._writing -= extent.nbytes if write else 0
        elif extent.state is State.WRITING:
            self._written(extent)
        elif extent.state is State.READING:
            self._read(extent)

    def _written(self, extent: Extent) -> None:
        if isinstance(extent.error, OSError):
            error, extent.error = extent.error, None
            self._traffic.failure = self._traffic.failure or error
            self._traffic.give_back(extent)
            self._write(extent, list(self._traffic.tiers.values()))
            return
        self._writing -= extent.nbytes
        if extent.error or version_of(extent.payload) != extent.version:
            extent.error = extent.error or RuntimeError(edited(extent.label))
            self._lost.append(extent)
            self._fail(extent)
        elif extent.uses and (not self._fetched or self._fetched + extent.nbytes <= self.staging):
            self._fetched += extent.nbytes
            self.stats.most_fetched = max(self.stats.most_fetched, self._fetched)
            self._move(extent, State.READY)
        else:
            self._order.extendleft([extent] * extent.uses)
            extent.queued, extent.uses = extent.queued + extent.uses, 0
            extent.payload = None
            self._move(extent, State.STORED)

    def _read(self, extent: Extent) -> None:
        if extent.error is None:
            extent.version = version_of(extent.payload)
            self._move(extent, State.READY)
            return
        self._fetched -= extent.nbytes
        advice = {"disk": "look at the system's log for the disk, or name another one in memory.disk.path", "host": "test the memory"}
        error = RuntimeError(
            f"{extent.label}: {extent.nbytes:,} bytes at offset {extent.offset:,} of the {extent.tier.name} tier cannot be read back "
            f"({extent.error}), so this step has no gradients; {advice[extent.tier.name]}, and go on from the last checkpoint"
        )
        error.__cause__ = extent.error
        extent.error = error
        self._fail(extent)

    def _fail(self, extent: Extent) -> None:
        self._same.pop(extent.key, None)
        extent.payload = None
        self._move(extent, State.FAILED)

    def _degraded(self, extent: Extent, cause: str) -> None:
        self.stats.degraded += 1
        if self._warning is None:
            self._warning = (
                f"offload: {cause}, so {extent.label} is kept in {'host memory' if extent.tier else 'device memory'}, and others may be. "
                "Results stay exact; memory may grow beyond the plan. Raise the budget named here, or plan for less"
            )

    def _move(self, extent: Extent, state: State) -> None:
        if state not in NEXT[extent.state]:
            raise RuntimeError(f"{extent.label}: {extent.state} cannot become {state}")
        tier = extent.tier.name if extent.tier else "device"
        self.events.append(Event(time.perf_counter(), extent.number, extent.label, extent.state, state, tier, extent.nbytes))
        extent.state = state


def _same_bytes(tensor: Tensor, payload: Tensor, place: Place) -> tuple | None:
    """What equal bytes have in common. The weak reference keeps the storage's address from being used again, as long as the key lives."""
    if tensor.is_inference():
        return None
    storage = StorageWeakRef(tensor.untyped_storage())
    if payload.data_ptr() == tensor.data_ptr():
        return place, storage, version_of(tensor), payload.data_ptr(), payload.nbytes
    return place, storage, version_of(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
