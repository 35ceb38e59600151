"""The disk tier: one preallocated file without a name, past the page cache, from tensors where they are or through an aligned slab.

Blocks of a MiB, whose checksums are taken while they are in a cache, and a few threads reach the disk's own rate; buffered writes reach a
fifth of it. mmap is not used: on a full disk it kills the process, where pwrite gives an error that can be handled.
"""

from __future__ import annotations

import errno
import os
import queue
import weakref
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from longtrain.offload.checksum import check, checksum
from longtrain.offload.host import Copies
from longtrain.offload.place import DiskSettings
from longtrain.offload.regions import ALIGNMENT, Regions, padded
from longtrain.offload.system import System
from longtrain.units import format_bytes

IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")


def check_disk(settings: DiskSettings, system: System | None = None) -> None:
    """Whether the disk tier can be made as `settings` say, without making it. Raises ValueError naming the setting and the remedy."""
    system, path = system or System(), settings.path
    if settings.budget < ALIGNMENT:
        raise ValueError(f"memory.disk.budget: {settings.budget} bytes hold nothing; give an amount such as 20GiB")
    if not os.path.isdir(path):
        found = "is not a directory" if os.path.exists(path) else "does not exist"
        raise ValueError(f"memory.disk.path: {path} {found}; make it, or name a directory on a local disk")
    if (kind := system.filesystem(path)) in IN_MEMORY:
        raise ValueError(f"memory.disk.path: {path} is {kind}, which is memory and no disk; name a directory on a local disk")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"memory.disk.path: {path} cannot be written to (read-only, or not yours); name another directory")
    if (free := system.free_bytes(path)) < settings.budget:
        raise ValueError(
            f"memory.disk.budget: {format_bytes(settings.budget)} is {format_bytes(settings.budget - free)} more than {path} has free; "
            f"set at most {free // 2**20}MiB, or name another disk in memory.disk.path"
        )


def room(nbytes: int) -> int:
    """At most what `nbytes` take in the file: whole pages, and one more for a tensor that the disk takes from where it is."""
    return padded(nbytes) + (ALIGNMENT if nbytes >= System.least_in_place else 0)


class DiskTier:
    """A file of `settings.budget` bytes; its space is taken at once, so that only the disk itself can refuse a write later."""

    name = "disk"
    setting = "memory.disk.budget"

    def __init__(self, settings: DiskSettings, slot_bytes: int, system: System, copies: Copies) -> None:
        check_disk(settings, system)
        self.regions = Regions(settings.budget, ALIGNMENT)
        self._system, self._copies = system, copies
        try:
            self._file: BinaryIO = system.open(settings.path, self.regions.nbytes)
        except OSError as error:
            raise ValueError(
                f"memory.disk: a file of {format_bytes(settings.budget)} cannot be made in {settings.path} ({error.strerror}); "
                "lower memory.disk.budget, or name another directory in memory.disk.path"
            ) from error
        self.direct = True
        self._switch(True)
        self._slab = system.allocate(system.threads * slot_bytes)
        copies.pin(self._slab)
        self._slots: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()  # one for each thread, so that none ever waits for one
        for slot in self._slab.reshape(system.threads, slot_bytes):
            self._slots.put(slot)
        self.close = weakref.finalize(self, _close, self._file, copies, self._slab)
        """At the latest when the tier, and the last transfer that holds it, are gone."""

    def write(self, offset: int, source: Tensor, mark: Any, extent: int) -> int:
        """One block, through the slab where the disk cannot take `source` itself; the checksum of what was handed to the disk. Raises
        OSError."""
        before = offset % ALIGNMENT
        if (pages := self._copies.reach(source, before, write=True)) is not None:
            written = checksum(source.numpy(), extent, offset)
            self._move(self._system.pwrite, memoryview(pages), offset - before)
            return written
        slot = self._slots.get()
        try:
            pages = slot[: padded(before + source.nbytes)]
            data = pages[before:][: source.nbytes]
            self._copies.down(data, source, mark)
            written = checksum(data, extent, offset)
            self._move(self._system.pwrite, memoryview(pages), offset - before)
            return written
        finally:
            self._slots.put(slot)

    def read(self, offset: int, target: Tensor, mark: Any, extent: int, expected: int | None) -> None:
        """One block, through the slab where the disk cannot write to `target` itself. Raises OSError, ChecksumError."""
        before = offset % ALIGNMENT
        if (pages := self._copies.reach(target, before, write=False)) is not None:
            self._move(self._system.pread, memoryview(pages), offset - before)
            check(target.numpy(), extent, offset, expected)
            return
        slot = self._slots.get()
        try:
            pages = slot[: padded(before + target.nbytes)]
            data = pages[before:][: target.nbytes]
            self._move(self._system.pread, memoryview(pages), offset - before)
            check(data, extent, offset, expected)
            self._copies.up(target, data, mark)
        finally:
            self._slots.put(slot)

    def _move(self, call: Callable[[BinaryIO, memoryview, int], int], data: memoryview, offset: int) -> None:
        """All of `data`, however few bytes the system moves at a time."""
        done = idle = 0
        while done < len(data):
            direct = self.direct
            try:
                count = call(self._file, data[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                self._switch(False)
                continue
            if direct and done + count < len(data):
                count -= count % ALIGNMENT  # go on from an offset that O_DIRECT takes
            idle = 0 if count else idle + 1
            if idle == 20:
                raise OSError(errno.EIO, f"no progress at offset {offset + done}")
            done += count

    def _switch(self, direct: bool) -> None:
        """O_DIRECT on or off; a file system that has none is used through the page cache."""
        try:
            self._system.direct(self._file, direct)
            self.direct = direct
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.direct = False


def _close(file: BinaryIO, copies: Copies, slab: np.ndarray) -> None:
    file.close()
    copies.unpin(slab)
