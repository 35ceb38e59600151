"""Where the metrics of a run go: always into `metrics.jsonl`, one JSON object a line; on request to TensorBoard and Weights & Biases.

A record is a dict of plain values with a `kind`: `run` (what runs where), `step`, `validation`, `checkpoint`, `spike`, `stopped`, `resume`
(what was dropped, so that the steps in the file are one trajectory), `result`. Those about a moment of the run have a `step`.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from longtrain.config import Config, Locations
from longtrain.files import said_plainly, write_whole
from longtrain.train.output import METRICS, read_metrics


class Sink(Protocol):
    """Takes records as they come."""

    def write(self, record: dict) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Hands every record to every sink; of several processes only the first has any."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = sinks

    def write(self, kind: str, **values) -> None:
        for sink in self.sinks:
            sink.write({"kind": kind, **values})

    def flush(self) -> None:
        """Have the system put `metrics.jsonl` on disk."""
        for sink in self.sinks[:1]:
            sink.flush()

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class JsonLines:
    """Appends records to a file; each is in it, whole, when `write` returns."""

    def __init__(self, path: Path, append: bool = False) -> None:
        self.path = path
        with said_plainly(path):
            self.file = open(path, "ab" if append else "wb", buffering=0)

    def write(self, record: dict) -> None:
        line = (json.dumps(record) + "\n").encode()
        start, written = self.file.tell(), 0
        with said_plainly(self.path):
            try:
                while written < len(line):  # a full disk takes a part first, then says why
                    written += self.file.write(line[written:])
            except OSError:
                self.file.truncate(start)
                raise

    def flush(self) -> None:
        with said_plainly(self.path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Numbers by step, as `kind/name`; those after `step` that a run before this one wrote are purged."""

    def __init__(self, directory: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory), purge_step=step + 1)

    def write(self, record: dict) -> None:
        for name, value in _numbers(record).items():
            self.writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Numbers by step, as `kind/name`, to the project's run whose id stands in the run's directory."""

    def __init__(self, project: str, directory: Path, config: dict) -> None:
        import wandb

        written = directory / "wandb.id"
        run_id = written.read_text().strip() if written.exists() else secrets.token_hex(4)
        written.write_text(run_id + "\n")
        self.run = wandb.init(project=project, dir=str(directory), id=run_id, resume="allow", config=config)
        self.run.define_metric("*", step_metric="step")

    def write(self, record: dict) -> None:
        if numbers := _numbers(record):
            self.run.log({"step": record["step"], **{f"{record['kind']}/{name}": value for name, value in numbers.items()}})

    def close(self) -> None:
        self.run.finish()


def check_extras(config: Config, where: Locations) -> None:
    """Raise ConfigError where a sink that the config asks for is not installed."""
    for name, wanted, module in (
        ("tensorboard", config.metrics.tensorboard, "torch.utils.tensorboard"),
        ("wandb", config.metrics.wandb, "wandb"),
    ):
        try:
            if wanted:
                __import__(module)
        except ImportError as error:
            raise where.error(f"metrics.{name}", f"{name} is not installed ({error}); get it with: pip install longtrain[{name}]") from None


def open_sinks(config: Config, directory: Path, step: int, append: bool) -> list[Sink]:
    """The JSON lines first. `step`: updates that were done before; `append`: after the records that stand there."""
    sinks: list[Sink] = [JsonLines(directory / METRICS, append)]
    if config.metrics.tensorboard:
        sinks.append(TensorBoard(directory / "tensorboard", step))
    if config.metrics.wandb is not None:
        sinks.append(WandB(config.metrics.wandb, directory, asdict(config)))
    return sinks


def rewind(path: Path, step: int) -> tuple[list[dict], dict]:
    """Drop from a metrics file what a run that went on from `step` will write again. Returns what is left, and what was dropped:
    ``{"dropped": records, "dropped_steps": [first, last] or None}``.
    """
    records = read_metrics(path)
    kept = [r for r in records if r.get("step", 0) <= step and r["kind"] != "result"]
    lines = "".join(json.dumps(record) + "\n" for record in kept)
    write_whole(path, lambda temporary: temporary.write_text(lines, encoding="utf-8"))
    gone = [r["step"] for r in records if r["kind"] == "step" and r["step"] > step]
    return kept, {"dropped": len(records) - len(kept), "dropped_steps": [min(gone), max(gone)] if gone else None}


def _numbers(record: dict) -> dict[str, float]:
    if "step" not in record:
        return {}
    return {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float)) and not isinstance(v, bool)}
