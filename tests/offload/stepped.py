"""A `System` for tests: transfers stop at every copy, read and write, and go on in a drawn order; memory and file start as noise.

Each transfer has a thread, but only one of them runs at a time, and only when the store waits or looks: the same seed is the same
schedule, whatever the machine does. What can go wrong is drawn too, and one of the waits can be left out.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections import Counter
from dataclasses import dataclass

import numpy as np

from longtrain.offload.system import Job, System


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Chances, for each call."""

    short: float = 0.0
    no_space: float = 0.0
    write_error: float = 0.0
    read_error: float = 0.0
    flip: float = 0.0
    no_direct: bool = False


class _Worker(threading.Thread):
    """Runs jobs, each from one `go` to the next."""

    def __init__(self, back: threading.Lock) -> None:
        super().__init__(daemon=True)
        self.go, self.back, self.job, self.busy = threading.Lock(), back, None, False
        self.go.acquire()
        self.start()

    def run(self) -> None:
        while True:
            self.go.acquire()
            if self.job is None:
                return
            self.job.run()
            self.busy = False
            self.back.release()


class MemoryFile:
    def __init__(self, noise: np.ndarray) -> None:
        self.data = noise

    def close(self) -> None:
        self.data = None


class Stepped(System):
    def __init__(self, seed: int, *, threads: int = 3, leave_out: str | None = None, faults: Faults = Faults()) -> None:
        super().__init__(threads)
        self.random, self.leave_out, self.faults = random.Random(seed), leave_out, faults
        self.device_memory = seed % 2 == 0
        self.least_in_place = self.random.choice((0, 100, System.least_in_place))
        self.noise = np.random.default_rng(seed)
        self.waiting: list[tuple[float, Job]] = []
        self.under_way: list[tuple[float, _Worker]] = []
        self.back = threading.Lock()
        self.back.acquire()
        self.workers = [_Worker(self.back) for _ in range(threads)]
        self.running: _Worker | None = None
        self.at_rest: list[np.ndarray] = []
        self.counts: Counter[str] = Counter()

    def honours(self, wait: str) -> bool:
        return wait != self.leave_out

    def submit(self, job: Job, urgent: bool) -> None:
        self.waiting.append((self.random.random(), job))

    def completed(self, timeout: float) -> Job | None:
        if timeout > 0:
            assert self.waiting or self.under_way, "the store waits for a transfer that does not exist"
        for _ in range(10**6 if timeout > 0 else self.random.choice((0, 0, 1, 2, 5))):
            if done := self._step():
                return done
        return None

    def stop(self) -> None:
        for worker in self.workers:
            worker.job = None
            worker.go.release()
        self.workers = []

    def drain(self) -> None:
        """Let every transfer end, and the threads."""
        while self.waiting or self.under_way:
            self._step()
        self.stop()

    def _step(self) -> Job | None:
        """One transfer goes on to its next stop. A drawn rank decides which, mostly, so that some are late for long."""
        choices = self.under_way + (self.waiting if len(self.under_way) < len(self.workers) else [])
        if not choices:
            return None
        rank, chosen = max(choices, key=lambda c: c[0]) if self.random.random() < 0.8 else self.random.choice(choices)
        if not isinstance(chosen, _Worker):
            self.waiting.remove((rank, chosen))
            worker = next(w for w in self.workers if not w.busy)
            worker.job, worker.busy = chosen, True
            chosen = worker
            self.under_way.append((rank, worker))
        self.running = chosen
        chosen.go.release()
        self.back.acquire()
        if chosen.busy:
            return None
        self.under_way.remove((rank, chosen))
        return chosen.job

    def _pause(self) -> None:
        worker = self.running
        self.back.release()
        worker.go.acquire()

    # --- the machine ---------------------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> np.ndarray:
        memory = self.noise.integers(0, 256, nbytes, np.uint8)
        self.at_rest.append(memory)
        return memory

    def open(self, path: str, nbytes: int) -> MemoryFile:
        return MemoryFile(self.allocate(nbytes))

    def filesystem(self, path: str) -> str:
        return "ext4"

    def free_bytes(self, path: str) -> int:
        return 1 << 40

    def direct(self, file: MemoryFile, on: bool) -> None:
        if on and self.faults.no_direct:
            raise OSError(errno.EINVAL, "no O_DIRECT here")

    def copy(self, target: np.ndarray, source: np.ndarray) -> None:
        self._pause()
        half = len(target) // 2
        target[:half] = source[:half]
        self._pause()
        target[half:] = source[half:]

    def pwrite(self, file: MemoryFile, data: memoryview, offset: int) -> int:
        self._pause()
        self._fault("no_space", errno.ENOSPC)
        self._fault("write_error", errno.EIO)
        n = self._some(len(data))
        file.data[offset : offset + n] = data[:n]
        return n

    def pread(self, file: MemoryFile, data: memoryview, offset: int) -> int:
        self._pause()
        self._fault("read_error", errno.EIO)
        n = self._some(len(data))
        np.frombuffer(data, np.uint8)[:n] = file.data[offset : offset + n]
        self._pause()
        return n

    def flip(self, memory: np.ndarray, start: int, stop: int) -> None:
        """One byte of a tier changes by itself."""
        memory[self.random.randrange(start, stop)] ^= 1 << self.random.randrange(8)
        self.counts["flip"] += 1

    def _some(self, nbytes: int) -> int:
        if self.random.random() >= self.faults.short:
            return nbytes
        self.counts["short"] += 1
        return self.random.randrange(1, nbytes + 1)

    def _fault(self, name: str, number: int) -> None:
        if self.random.random() < getattr(self.faults, name):
            self.counts[name] += 1
            raise OSError(number, os.strerror(number))
