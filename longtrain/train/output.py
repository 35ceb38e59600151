"""What a run writes: files that are whole or absent, and metrics, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

CONFIG, METRICS, WEIGHTS, PLOT = "config.yaml", "metrics.jsonl", "model.safetensors", "loss.png"


class RunError(Exception):
    """The run stopped; the message says where and what to do. The command ends with exit code 1."""


def holds_run(directory: Path) -> bool:
    """Whether a run has written here before."""
    return any((directory / name).exists() for name in (CONFIG, METRICS, WEIGHTS))


@contextmanager
def said_plainly(path: Path) -> Iterator[None]:
    """Turn what the system says about writing `path` into a RunError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(
            f"{path} cannot be written ({reason}); make room or give permission there, or set output.dir to another place"
        ) from error


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: `path` is the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.partial")
    with said_plainly(path):
        try:
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


class Metrics:
    """Appends records to a JSON-lines file; each is on disk, whole, when `write` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with said_plainly(path):
            self.file = open(path, "wb", buffering=0)

    def write(self, kind: str, **values) -> None:
        line = (json.dumps({"kind": kind, **values}) + "\n").encode()
        start = self.file.tell()
        with said_plainly(self.path):
            try:
                written = self.file.write(line)
                if written < len(line):
                    self.file.write(line[written:])  # a full disk takes a part first, then says why
            except OSError:
                self.file.truncate(start)
                raise

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
