"""What a run writes: files that are whole or absent, and how a directory with a run in it is known."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

CONFIG, METRICS, WEIGHTS, PLOT, CHECKPOINTS = "config.yaml", "metrics.jsonl", "model.safetensors", "loss.png", "checkpoints"
MODEL = "model"
"""In place of WEIGHTS, where the model is one of transformers: a directory as its `save_pretrained` writes it."""
EVALUATION, REPORT = "evaluation.json", "report.html"


class RunError(Exception):
    """The run stopped; the message says where and what to do. The command ends with exit code 1."""


def holds_run(directory: Path) -> bool:
    """Whether a run has written here before."""
    return any((directory / name).exists() for name in (CONFIG, METRICS, WEIGHTS, MODEL, CHECKPOINTS))


def finished_at(directory: Path) -> int | None:
    """The number of updates of the finished run in `directory`; None where it did not finish."""
    if not (directory / METRICS).exists():
        return None
    return next((record["step"] for record in read_metrics(directory / METRICS) if record["kind"] == "result"), None)


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


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics file. A last line that a dying process left half written is not one. Raises RunError for another that is
    damaged."""
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{path}:{number} is no record of a run ({error}); remove that line") from None
    return records
