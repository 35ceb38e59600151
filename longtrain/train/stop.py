"""How a run is asked to end before its last update: Ctrl-C, SIGTERM, or a time limit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

OUT_OF_TIME = 75
"""Exit code of a run that ended at --stop-after: EX_TEMPFAIL of sysexits.h, "try again later"."""


class Stopped(Exception):
    """The run was asked to end; the state after the last whole update can be saved."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class Stop:
    """While it is entered, the first SIGINT or SIGTERM is noted and `check` raises Stopped; the second ends the process at once.

    `deadline`: by `time.monotonic`, which no clock change moves. `agree`: the greatest over several processes, which all `check` at the
    same places; what one is asked, all do. `name`: of this one.
    """

    def __init__(self, deadline: float | None, agree: Callable[[Sequence[float]], Sequence[float]] = list, name: str = "") -> None:
        self.deadline, self.agree, self.name = deadline, agree, name
        self.received: int | None = None
        self.before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        os.write(2, f"\nlongtrain: {self.name}{signal.Signals(number).name}: saving, then ending; once more ends at once\n".encode())

    def check(self, ahead: float = 0.0) -> None:
        """Raise Stopped if a signal came, or if the deadline is nearer than `ahead` seconds."""
        late = self.deadline is not None and time.monotonic() + ahead > self.deadline
        received, late = self.agree([self.received or 0, late])
        if received:
            raise Stopped(signal.Signals(int(received)).name, 128 + int(received))
        if late:
            raise Stopped("time limit", OUT_OF_TIME)
