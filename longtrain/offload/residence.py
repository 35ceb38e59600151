"""Where the bytes of each extent are: every change of its state, and what staging has room for.

A tier that cannot take an extent is replaced by the next higher one, with one warning; the source is still there. What cannot be read
back, or is not what was written, is an error: never zeros.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Iterable
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from longtrain.offload.extent import NEXT, Event, Extent, Form, State, Tier, pack
from longtrain.offload.place import DEVICE, DiskSettings, Place
from longtrain.offload.store import edited, version_of
from longtrain.offload.system import System
from longtrain.offload.traffic import Traffic


class Kept(NamedTuple):
    """What was put under a name and a span."""

    extent: Extent
    form: Form | None
    """None: the payload is the tensor itself."""


class Residence:
    """The extents of a `TieredStore`, without their names. Its caller sees to it that one thread at a time is in here."""

    def __init__(
        self, device: torch.device, host_bytes: int, disk: DiskSettings | None, staging_bytes: int, system: System, events: int
    ) -> None:
        self.device, self._system = device, system
        self.traffic = Traffic(device, host_bytes, disk, staging_bytes, system, self._arrived)
        self.stats, self.staging = self.traffic.stats, self.traffic.staging
        self.events: deque[Event] = deque(maxlen=events)
        """The latest transitions."""
        self._same: dict[tuple, Extent] = {}
        self._order: deque[Extent] = deque()
        self._lost: list[Extent] = []
        self._writing = self._fetched = 0
        self._warning: str | None = None
        self._number = count()

    def keep(self, label: str, tensor: Tensor, place: Place) -> Kept:
        """What is put: its write begins, unless it stays on the device or its bytes are there already."""
        below = self.traffic.tiers
        if place.tier not in ("device", *below):
            setting = {"host": "memory.host_budget", "disk": "memory.disk"}[place.tier]
            raise ValueError(f"{label}: {place} needs a tier that this run does not have; set {setting}")
        if tensor.device.type != self.device.type:
            raise ValueError(f"{label}: is on {tensor.device}, this store serves {self.device}; move the tensor")
        if not tensor.numel() or place == DEVICE:
            return Kept(self._resident(label, tensor), None)
        payload, form = pack(tensor, place.compress)
        key = _same_bytes(tensor, payload, place)
        if key in self._same:
            extent = self._same[key]
            extent.holders += 1
            self.stats.deduplicated += 1
            return Kept(extent, form)
        if place.tier == "device":
            return Kept(self._resident(label, payload), form)
        self.traffic.wait("room", lambda: not self._writing or self._writing + payload.nbytes <= self.staging)
        extent = Extent(next(self._number), label, payload, version_of(payload), payload.nbytes)
        self._writing += extent.nbytes
        self.stats.most_writing = max(self.stats.most_writing, self._writing)
        candidates = ("disk", "host") if place.tier == "disk" else ("host",)
        self._write(extent, [below[name] for name in candidates if name in below])
        if key:
            extent.key = key
            self._same[key] = extent
        return Kept(extent, form)

    def _resident(self, label: str, payload: Tensor) -> Extent:
        extent = Extent(next(self._number), label, payload, version_of(payload), payload.nbytes)
        self._move(extent, State.RESIDENT)
        return extent

    def fetch(self, extent: Extent) -> None:
        """Begin to read what is in a tier alone."""
        if extent.state is State.READY and version_of(extent.payload) != extent.version:
            self._drop(extent)  # who was handed it before has edited it
        if extent.state is State.STORED:
            extent.payload = self.traffic.copies.buffer(extent.nbytes, extent.lead)
            self._fetched += extent.nbytes
            self.stats.most_fetched = max(self.stats.most_fetched, self._fetched)
            self._move(extent, State.READING)
            self.traffic.begin(extent, write=False)

    def take(self, kept: Kept) -> Tensor:
        """The tensor, waited for where it is being read."""
        extent = kept.extent
        self.fetch(extent)  # again: while others were waited for, its write may have ended, or its twin may have been taken
        self.traffic.wait("fetched", lambda: extent.state is not State.READING)
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

    def announce(self, extents: Iterable[Extent], *, first: bool) -> None:
        """Their next uses, in order, after all that were announced before (`first`: before them)."""
        coming = [extent for extent in extents if extent.state not in (State.RESIDENT, State.FAILED)]
        for extent in coming:
            extent.queued += 1
        if first:
            self._order.extendleft(reversed(coming))
        else:
            self._order.extend(coming)
        self.advance()

    def advance(self) -> None:
        """Fetch ahead, in the announced order, what staging has room for."""
        while self._order:
            extent = self._order[0]
            if extent.state is State.STORED:
                if self._fetched and self._fetched + extent.nbytes > self.staging:
                    return
                self.fetch(extent)
            self._order.popleft()
            extent.queued -= 1
            if extent.state in (State.WRITING, State.READING, State.READY):
                extent.uses += 1

    def warn(self) -> None:
        """That a tier was replaced: once in the store's life, from the caller's thread."""
        if self._warning:
            text, self._warning = self._warning, ""
            warnings.warn(text, RuntimeWarning, stacklevel=4)

    def raise_lost(self) -> None:
        """Raises RuntimeError where a write went wrong since the last call, of what is still wanted."""
        lost, self._lost = [e for e in self._lost if e.state is State.FAILED], []
        if lost:
            raise RuntimeError(str(lost[0].error))

    def let_go(self, extent: Extent) -> None:
        """Of one of the names it was put under; with the last its bytes are gone."""
        extent.holders -= 1
        if extent.holders:
            return
        if extent.state in (State.READING, State.READY):
            self._fetched -= extent.nbytes
        self._same.pop(extent.key, None)
        self._move(extent, State.RELEASED)
        extent.payload = None
        self.traffic.leave(extent)

    def _drop(self, extent: Extent) -> None:
        self._fetched -= extent.nbytes
        extent.payload = None
        self._move(extent, State.STORED)

    # --- transfers -----------------------------------------------------------------------------------------------------------------

    def _write(self, extent: Extent, tiers: list[Tier]) -> None:
        """Begin to write to the first of `tiers` that has room; on the device where none has."""
        cause = None
        for tier in tiers:
            refused = self.traffic.take_room(tier, extent)
            if refused is None:
                self._move(extent, State.WRITING)
                if cause:
                    self._degraded(extent, cause)
                self.traffic.begin(extent, write=True)
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
            self.traffic.failure = self.traffic.failure or error
            self.traffic.give_back(extent)
            self._write(extent, list(self.traffic.tiers.values()))
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
