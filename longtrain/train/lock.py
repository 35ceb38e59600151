"""One run at a time writes a directory."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longtrain.errors import RunError
from longtrain.files import said_plainly

LOCK = "lock"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make `directory` and hold its lock. The system lets go of it when the process ends, however it ends; the file stays.

    Raises RunError naming the process that holds it.
    """
    with said_plainly(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / LOCK, "a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunError(f"{directory} is being written by {holder}; end that run first, or set output.dir to another place") from None
        with said_plainly(directory / LOCK):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield
