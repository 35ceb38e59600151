"""What a run writes, and how a directory with a run in it is known."""

from __future__ import annotations

import json
from pathlib import Path

from longtrain.errors import RunError

CONFIG, METRICS, WEIGHTS, PLOT, CHECKPOINTS = "config.yaml", "metrics.jsonl", "model.safetensors", "loss.png", "checkpoints"
MODEL = "model"
"""In place of WEIGHTS, where the model is one of transformers: a directory as its `save_pretrained` writes it."""
EVALUATION, REPORT = "evaluation.json", "report.html"


def holds_run(directory: Path) -> bool:
    """Whether a run has written here before."""
    return any((directory / name).exists() for name in (CONFIG, METRICS, WEIGHTS, MODEL, CHECKPOINTS))


def finished_at(directory: Path) -> int | None:
    """The number of updates of the finished run in `directory`; None where it did not finish."""
    if not (directory / METRICS).exists():
        return None
    return next((record["step"] for record in read_metrics(directory / METRICS) if record["kind"] == "result"), None)


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
