"""A run of several processes ends as one: what one of them finds wrong, or that one is dead or stuck, ends all, and is said once.

Each process has a thread that writes a sign of life into the store by which they met, once a second, with what its main thread is doing,
and reads those of the others. Collectives need no short time limits of their own.

    failed   {"rank", "message", "code"}: the first that ended the job; written once
    told     how many were ready to print the message: the first, rank 0 where it lives, does
    rank r   {"beat", "process", "doing", "at"}
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from types import FrameType, TracebackType

import torch.distributed as dist

BEAT = 1.0
"""Seconds between two signs of life."""
SILENT = 15.0
"""Seconds without one after which a process counts as dead."""
GONE = 4.0
"""The same, where a collective has already failed."""
LIMIT = 3600.0
"""Seconds in which what has no limit of its own must be done: reading weights, waiting for a checkpoint's disk."""
TELL = 5.0
"""Seconds in which rank 0 should have printed the error of another; after that, the other does."""
NOWHERE = "no collective"
_AT = ("torch/distributed/", "longtrain/parallel/")


class Watch:
    """`rank` of `size` processes that met by `store`. Say what is being done with `doing` and `moved`."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = dist.PrefixStore("longtrain", store.clone()), rank, size
        self.store.set_timeout(timedelta(seconds=SILENT))
        self.process = f"process {os.getpid()} on {socket.gethostname()}"
        self.main = threading.main_thread().ident
        self.beats = 0
        self.said, self.limit, self.since = "starting", LIMIT, time.monotonic()
        self.waited_at: str | None = None
        self.ending = threading.Lock()
        self.closed = threading.Event()
        self.beat()
        self.thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def start(self, wait: timedelta) -> None:
        """Once all have written their first sign of life. Raises RuntimeError where they have not after `wait`."""
        self.store.wait([f"rank {r}" for r in range(self.size)], wait)
        self.thread.start()

    def close(self) -> None:
        """Nobody waits for this rank any more."""
        self.closed.set()
        self.thread.join()

    def doing(self, what: str, limit: float = LIMIT) -> None:
        """From now on `what`, which must get ahead (`moved`) every `limit` seconds."""
        self.said, self.since, self.limit = what, time.monotonic(), limit

    def moved(self) -> None:
        self.since = time.monotonic()

    def end(self, message: str, code: int) -> None:
        """End this process, and by that all others: with this message, or with an earlier one of another process. Does not return."""
        self.ending.acquire()  # the other thread of this process may be here already: it ends both
        found, told = {"rank": self.rank, "message": message, "code": code}, False
        try:
            found = json.loads(self.store.compare_set("failed", "", json.dumps(found)))
            deadline = time.monotonic() + TELL
            while self.rank and not self.store.check(["told"]) and time.monotonic() < deadline:
                time.sleep(0.1)
            told = self.store.add("told", 1) > 1
        except RuntimeError:  # the store went with the process that kept it: nobody else can tell
            told = False
        if not told:
            sys.stdout.flush()
            of = "" if found["rank"] == self.rank else f"rank {found['rank']}: "
            print(f"{of}{found['message']}", file=sys.stderr, flush=True)
        os._exit(found["code"])

    def lost(self, error: BaseException) -> None:
        """Another process went away while this one's main thread waited for it: the other thread will know which. Does not return."""
        self.waited_at = at_of_traceback(error.__traceback__)
        time.sleep(SILENT + 5 * BEAT)
        self.end(f"{self.said}: {self.waited_at}: {error}", 1)

    def beat(self) -> None:
        self.beats += 1
        said = {"beat": self.beats, "process": self.process, "doing": self.said, "at": self.at()}
        self.store.set(f"rank {self.rank}", json.dumps(said))

    def at(self) -> str:
        """The collective that the main thread waits in; else one of another thread (a checkpoint's); else where the main thread is."""
        frames = sys._current_frames()
        found = [at_of_frame(frames.pop(self.main)), *map(at_of_frame, frames.values())]
        return self.waited_at or next((at for at in found if not at.startswith(NOWHERE)), found[0])

    def _run(self) -> None:
        ranks = range(self.size)
        heard, seen = dict.fromkeys(ranks, time.monotonic()), dict.fromkeys(ranks, 0)
        while not self.closed.wait(BEAT):
            try:
                self.beat()
                if self.store.check(["failed"]):
                    self.end("", 1)
                beats = [json.loads(said) for said in self.store.multi_get([f"rank {r}" for r in ranks])]
            except RuntimeError as error:
                self.end(f"{self.said}: the store of the job is gone, and with it the process that kept it ({error}); all ranks end", 1)
            now = time.monotonic()
            for r in ranks:
                if beats[r]["beat"] != seen[r]:
                    heard[r], seen[r] = now, beats[r]["beat"]
            silent = [r for r in ranks if now - heard[r] > (SILENT if self.waited_at is None else GONE)]
            if silent:
                self.end(_of_the_dead(beats, silent, self.rank), 1)
            if now - self.since > self.limit:
                where = "; ".join(f"rank {r} is at {said['at']}" for r, said in enumerate(beats))
                self.end(f"{self.said}: a rank is stuck: nothing moved for {self.limit:.0f} s: {where}; all ranks end", 1)


def _of_the_dead(beats: list[dict], silent: list[int], rank: int) -> str:
    who = " and ".join(f"rank {r} ({beats[r]['process']}, last in {beats[r]['doing']})" for r in silent)
    own = beats[rank]
    return (
        f"{own['doing']}: {who} gives no sign of life: dead or stuck; rank {rank} was at {own['at']}; all ranks end, and the "
        "same command goes on from the newest checkpoint"
    )


def at_of_frame(frame: FrameType | None) -> str:
    """`all_to_all_single (distributed_c10d.py:4812)`: the innermost collective, else the innermost function."""
    innermost = frame
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in _AT):
            return _named(frame, frame.f_lineno)
        frame = frame.f_back
    return NOWHERE + ("" if innermost is None else f", {_named(innermost, innermost.f_lineno)}")


def at_of_traceback(traceback: TracebackType | None) -> str:
    """The same, of where an error was raised."""
    found = None
    while traceback is not None:
        if found is None or any(part in traceback.tb_frame.f_code.co_filename for part in _AT):
            found = _named(traceback.tb_frame, traceback.tb_lineno)
        traceback = traceback.tb_next
    return found or "nowhere"


def _named(frame: FrameType, line: int) -> str:
    return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{line})"
