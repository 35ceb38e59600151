"""What the token store takes from the operating system: threads, memory, files.

One object, given to the store, so that a test can give another: one that delays, reorders, splits, fails, flips a byte, or leaves out a
wait. Nothing else in this folder starts a thread or reads a file.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import queue
import tempfile
import threading
from itertools import count
from typing import BinaryIO, Protocol

import numpy as np

WAITS = {
    "room": "put waits until what is being written leaves room in staging",
    "written": "an extent is read only after it is written, and forwarded from its source until then",
    "fetched": "get waits until an extent is read",
    "blocks": "a transfer is done when every one of its blocks is",
    "idle": "the room of a released extent is used again only when no transfer touches it any more",
    "computed": "CUDA: a copy starts after the kernels that were queued before it",
    "copied": "CUDA: a transfer is done when its copy is",
}
"""Every dependency between transfers and their surroundings. A test leaves out one at a time (`System.honours`) and must fail."""


class Job(Protocol):
    def run(self) -> None:
        """Does a transfer, in a thread; keeps what went wrong for who absorbs it."""


class System:
    """Threads, anonymous memory and files of this machine."""

    grace_seconds = 30.0
    least_bandwidth = 10e6
    """A wait for n bytes ends in an error after ``grace_seconds + n / least_bandwidth``, in bytes a second: a dead disk is no hang."""

    device_memory = True
    """Whether a disk may take a CPU's tensors, and fill them, directly; a test says no, and goes the way of a GPU."""

    least_in_place = 256 << 10
    """Bytes of a tensor that are worth up to a page more on the disk, to be spared the copy to memory that begins where a page does."""

    def __init__(self, threads: int = 8) -> None:
        self.threads = threads
        self._serial = count()
        self._jobs: queue.PriorityQueue = queue.PriorityQueue()
        self._done: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []

    def honours(self, wait: str) -> bool:
        """Whether a wait of `WAITS` is made. Always, but in tests."""
        return True

    def delay(self) -> None:
        """Called before each copy, on a GPU's copy stream; a test makes the copy late."""

    def submit(self, job: Job, urgent: bool) -> None:
        """Run `job` in a thread, urgent ones (reads, which somebody waits for) first."""
        if not self._workers:
            for _ in range(self.threads):
                self._workers.append(threading.Thread(target=_work, args=(self._jobs, self._done), name="longtrain offload", daemon=True))
                self._workers[-1].start()
        self._jobs.put((0 if urgent else 1, next(self._serial), job))

    def completed(self, timeout: float) -> Job | None:
        """A job that has been run, or None where there is none within `timeout` seconds."""
        try:
            return self._done.get(timeout=timeout) if timeout > 0 else self._done.get_nowait()
        except queue.Empty:
            return None

    def stop(self) -> None:
        """The threads end after the jobs they have."""
        for _ in self._workers:
            self._jobs.put((2, next(self._serial), None))
        self._workers = []

    def allocate(self, nbytes: int) -> np.ndarray:
        """``[nbytes]`` uint8, page-aligned, taken from the system as it is touched. Raises OSError."""
        return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)

    def copy(self, target: np.ndarray, source: np.ndarray) -> None:
        """One thread, without Python's lock (torch would start a team of threads in each of ours)."""
        self.delay()
        np.copyto(target, source)

    def filesystem(self, path: str) -> str:
        """The type of the file system that holds `path` (ext4, xfs, tmpfs), or "" where the system does not say."""
        device = os.stat(path).st_dev
        try:
            with open("/proc/self/mountinfo") as mounts:
                fields = [line.split() for line in mounts]
        except FileNotFoundError:
            return ""
        return next((f[f.index("-") + 1] for f in fields if f[2] == f"{os.major(device)}:{os.minor(device)}"), "")

    def free_bytes(self, path: str) -> int:
        room = os.statvfs(path)
        return room.f_bavail * room.f_frsize

    def open(self, path: str, nbytes: int) -> BinaryIO:
        """A file of `nbytes` in `path` that has no name: it is gone when this process is, however it ends. Raises OSError."""
        file = tempfile.TemporaryFile(dir=path, buffering=0)
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError:
            file.close()
            raise
        return file

    def direct(self, file: BinaryIO, on: bool) -> None:
        """Past the page cache, or through it. Raises OSError (EINVAL) where the file system cannot."""
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)

    def pwrite(self, file: BinaryIO, data: memoryview, offset: int) -> int:
        return os.pwrite(file.fileno(), data, offset)

    def pread(self, file: BinaryIO, data: memoryview, offset: int) -> int:
        return os.preadv(file.fileno(), [data], offset)


def _work(jobs: queue.PriorityQueue, done: queue.SimpleQueue) -> None:
    while (job := jobs.get()[2]) is not None:
        job.run()
        done.put(job)
        del job


