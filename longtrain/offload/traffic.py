"""Blocks between the device and the tiers: room for them, threads that move them, and the waits for them.

What a block's arrival means for its extent is the store's business (`arrived`).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longtrain.offload.disk import DiskTier
from longtrain.offload.extent import Extent, State, Tier
from longtrain.offload.host import HostTier, copies_for
from longtrain.offload.place import DiskSettings
from longtrain.offload.regions import ALIGNMENT
from longtrain.offload.system import WAITS, System
from longtrain.units import format_bytes

LARGEST_BLOCK = 1 << 20


def staging_rooms(staging_bytes: int, disk: bool, threads: int) -> tuple[int, int, int]:
    """What staging is divided into: bytes of a block, of a disk's slab (a block for each thread, and what the last one of an extent may be
    longer by, its lead), and of writes under way; as many again are for what is fetched ahead."""
    block = min(LARGEST_BLOCK, staging_bytes // (4 * threads)) // ALIGNMENT * ALIGNMENT
    slab = threads * (block + ALIGNMENT) if disk else 0
    return block, slab, (staging_bytes - slab) // 2


@dataclass(slots=True)
class Stats:
    """What the store has done so far; bytes are those of the extents."""

    written: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)
    disk_written: int = 0
    """Bytes that were given to the disk to write, padding included: what counts against max_written."""
    forwarded: int = 0
    """Gets that were answered by a source on its way."""
    deduplicated: int = 0
    """Puts of bytes that were there already."""
    degraded: int = 0
    """Extents that went to a higher tier than asked for."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Waited, by the name of the wait (`longtrain.offload.system.WAITS`)."""
    most_writing: int = 0
    most_fetched: int = 0
    """Most bytes of staging that were taken at a time by writes, and by what was fetched ahead."""


@dataclass(slots=True, eq=False)
class Transfer:
    """One block of an extent between the device and a tier: a job of `System`."""

    extent: Extent
    tier: Tier
    offset: int
    start: int
    block: Tensor
    mark: Any
    write: bool
    checksum: int | None = None
    error: Exception | None = None
    moved: bool = False

    def run(self) -> None:
        if self.extent.state is State.RELEASED:
            return
        self.moved = True
        try:
            if self.write:
                self.checksum = self.tier.write(self.offset, self.block, self.mark, self.extent.number)
            else:
                self.tier.read(self.offset, self.block, self.mark, self.extent.number, self.checksum)
        except Exception as error:  # raised, or answered by another tier, where the transfer is absorbed
            self.error = error


class Traffic:
    """Everything that is on its way, and the tiers it goes to. `arrived(extent, write)` is called, from the caller's thread, when all
    blocks of an extent are back."""

    def __init__(
        self,
        device: torch.device,
        host_bytes: int,
        disk: DiskSettings | None,
        staging_bytes: int,
        system: System,
        arrived: Callable[[Extent, bool], None],
    ) -> None:
        self.system, self.copies, self._arrived = system, copies_for(device, system, staging_bytes), weakref.WeakMethod(arrived)
        block, slab, self.staging = staging_rooms(staging_bytes, disk is not None, system.threads)
        if block < ALIGNMENT:
            raise ValueError(f"staging_bytes: {staging_bytes:,} leaves {system.threads} threads less than a page; give 1 MiB or more")
        self.block_bytes, slot = block, slab // system.threads
        self.tiers: dict[str, Tier] = {}
        if disk:
            self.tiers["disk"] = DiskTier(disk, slot, system, self.copies)
        if host_bytes:
            self.tiers["host"] = HostTier(host_bytes, system, self.copies)
        self._may_write = disk.max_written if disk and disk.max_written is not None else float("inf")
        self.moving = 0
        """Bytes that are under way."""
        self.leaving = 0
        """Released extents whose blocks still are."""
        self.failure: OSError | None = None
        """The disk's, when it refused to write: then it is left alone."""
        self.stats = Stats()

    def take_room(self, tier: Tier, extent: Extent) -> str | None:
        """None where `tier` has taken it, else why not."""
        disk = tier.name == "disk"
        extent.lead = self.copies.lead(extent.payload) if disk else 0
        padded = tier.regions.padded(extent.room)
        if disk and self.failure:
            return f"writing to memory.disk.path failed ({self.failure})"
        if disk and self.stats.disk_written + padded > self._may_write:
            return f"memory.disk.max_written ({format_bytes(self._may_write)}) is reached"
        offset = tier.regions.take(extent.room)
        if offset is None and self.leaving:
            self.wait("idle", lambda: not self.leaving)
            offset = tier.regions.take(extent.room)
        if offset is None:
            return f"{tier.setting} ({format_bytes(tier.regions.nbytes)}) has no {format_bytes(extent.nbytes)} in one piece left"
        extent.tier, extent.offset = tier, offset
        self.stats.disk_written += padded if disk else 0
        return None

    def give_back(self, extent: Extent) -> None:
        if extent.tier:
            extent.tier.regions.give(extent.offset, extent.room)
            extent.tier = None

    def leave(self, extent: Extent) -> None:
        """Of a released extent: its room is given back when nothing touches it any more."""
        self.leaving += extent.pending > 0
        if not extent.pending or not self.system.honours("idle"):
            self.give_back(extent)

    def begin(self, extent: Extent, *, write: bool) -> None:
        mark, at = self.copies.mark(), extent.offset + extent.lead
        # All but the first begin where a page of memory does.
        cuts = [0, *range(self.block_bytes - extent.lead, extent.nbytes - extent.lead, self.block_bytes), extent.nbytes]
        for start, stop in pairwise(cuts):
            block = extent.payload[start:stop]
            checksum = None if write else extent.checksums.get(start)
            extent.pending += 1
            self.moving += block.nbytes
            self.system.submit(Transfer(extent, extent.tier, at + start, start, block, mark, write, checksum), urgent=not write)

    def poll(self) -> None:
        """Absorb what is done."""
        while (done := self.system.completed(0)) is not None:
            self._absorb(done)

    def wait(self, wait: str, until: Callable[[], bool]) -> None:
        if self.system.honours(wait):
            self.absorb_until(wait, until)

    def absorb_until(self, wait: str, until: Callable[[], bool]) -> None:
        """Raises RuntimeError where it takes longer than the slowest device that is one."""
        if until():
            return
        started, moving = time.perf_counter(), self.moving
        limit = self.system.grace_seconds + moving / self.system.least_bandwidth
        while not until():
            left = started + limit - time.perf_counter()
            done = self.system.completed(max(left, 0))
            if done is not None:
                self._absorb(done)
            elif left <= 0:
                raise RuntimeError(
                    f"offload: {moving:,} bytes are not moved after {limit:.0f} s, slower than {self.system.least_bandwidth / 1e6:g} MB/s "
                    f"({WAITS[wait]}); look at the disk of memory.disk.path, or leave memory.disk out"
                )
        self.stats.seconds[wait] = self.stats.seconds.get(wait, 0.0) + time.perf_counter() - started

    def _absorb(self, done: Transfer) -> None:
        extent = done.extent
        extent.pending -= 1
        self.moving -= done.block.nbytes
        extent.error = extent.error or done.error
        if done.write:
            extent.checksums[done.start] = done.checksum
        if done.moved:
            moved = self.stats.written if done.write else self.stats.read
            moved[done.tier.name] = moved.get(done.tier.name, 0) + done.block.nbytes
        elif done.write and done.tier.name == "disk":
            self.stats.disk_written -= done.tier.regions.padded(done.offset % ALIGNMENT + done.block.nbytes)
        if extent.pending and self.system.honours("blocks"):
            return
        if extent.state is State.RELEASED:
            self.leaving -= not extent.pending
            self.give_back(extent)
        self._arrived()(extent, done.write)

    def close(self) -> None:
        self.absorb_until("idle", lambda: not self.moving)
        self.system.stop()
        for tier in self.tiers.values():
            tier.close()
        self.tiers = {}
