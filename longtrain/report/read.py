"""What a run wrote, read back for the report: whatever is missing, unfinished, repeated or of a kind not known here is no error."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from longtrain.errors import RunError
from longtrain.train.output import CONFIG, EVALUATION, METRICS
from longtrain.units import format_bytes, format_time

KNOWN = {"run", "step", "validation", "result", "resume", "checkpoint", "spike", "stopped"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The records of a run by kind. `steps` and `validations` hold each step once, as it was written last, in order."""

    name: str
    starts: list[dict]
    """The `run` and `resume` records: where and with what each part of the run began."""
    steps: list[dict]
    validations: list[dict]
    evaluation: dict | None
    """The last word on the weights: what `train --eval` wrote, else the last validation."""
    events: list[dict]
    """Checkpoints, spikes, stops and resumes, in the order they were written."""
    result: dict | None
    others: Counter
    broken: list[int]
    """Lines of the metrics file, from 1, that are not records."""
    config_text: str
    config: dict

    def setting(self, section: str, key: str, default=None):
        """A setting of the resolved configuration, `default` where it is not known."""
        value = (self.config.get(section) or {}).get(key)
        return default if value is None else value

    @property
    def first(self) -> dict:
        """What the run began with, with what later parts say instead."""
        return {k: v for start in self.starts for k, v in start.items() if v is not None}


def read_run(directory: Path) -> Run:
    """Read a run's directory. Raises RunError where no metrics file is."""
    path = directory / METRICS
    if not path.is_file():
        raise RunError(f"{directory} holds no {METRICS}, so there is nothing to report; name the directory that a run wrote")
    records, broken = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line, parse_constant=lambda name: None)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("kind"), str):
            records.append(record)
        elif line.strip():
            broken.append(number)
    config_text = (directory / CONFIG).read_text(encoding="utf-8") if (directory / CONFIG).is_file() else ""
    try:
        evaluation = json.loads((directory / EVALUATION).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # nobody asked for one, or it is damaged: the last validation stands in
        evaluation = None
    validations = by_step(records, "validation")
    return Run(
        name=directory.resolve().name,
        starts=[r for r in records if r["kind"] in ("run", "resume")],
        steps=by_step(records, "step"),
        validations=validations,
        evaluation=evaluation or (validations[-1] if validations else None),
        events=[r for r in records if r["kind"] in ("resume", "checkpoint", "spike", "stopped")],
        result=next((r for r in reversed(records) if r["kind"] == "result"), None),
        others=Counter(r["kind"] for r in records if r["kind"] not in KNOWN),
        broken=broken,
        config_text=config_text,
        config=yaml.safe_load(config_text) or {},
    )


def by_step(records: Sequence[dict], kind: str) -> list[dict]:
    """Records of a kind in the order of their steps; of a step that was done again, the last."""
    last = {r["step"]: r for r in records if r["kind"] == kind and isinstance(r.get("step"), int)}
    return [last[step] for step in sorted(last)]


def number(record: dict | None, key: str) -> float | None:
    """A finite number, or None."""
    value = (record or {}).get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def count_parameters(run: Run) -> int | None:
    """Of a model described by the configuration; None where it is not known."""
    model = run.config.get("model") or {}
    try:
        width, heads, kv_heads = model["hidden_size"], model["num_heads"], model["num_kv_heads"]
        if model.get("layers"):
            return None  # mixers of other shapes
        attention = 2 * width * (model.get("head_dim") or width // heads) * (heads + kv_heads)
        layer = attention + 3 * width * model["intermediate_size"] + 2 * width
        return model["num_layers"] * layer + model["vocab_size"] * width * (1 if model.get("tie_embeddings") else 2) + width
    except (KeyError, TypeError):
        return None


def sentence(run: Run) -> str:
    """What the run did, in one sentence: as much of it as is known."""
    parameters, planned = count_parameters(run), run.setting("train", "steps")
    what = f"A model of {amount(parameters)} parameters" if parameters else "A model"
    if not run.steps:
        return f"{what} was made, and no update is recorded."
    done = run.steps[-1]["step"]
    of = f" of {planned:,}" if planned and planned != done else ""
    tokens = sum(number(r, "tokens") or 0 for r in run.steps)
    longest = max((number(r, "seq_len") or 0 for r in run.steps), default=0)
    parts = [f"{what} learned from {amount(tokens)} tokens of {source_of(run)}" if tokens else f"{what} was trained"]
    parts[0] += f" in {done:,}{of} updates" + (f", in sequences of up to {longest:,} tokens" if longest else "")
    seconds = number(run.result, "seconds") or sum(number(r, "seconds") or 0 for r in run.steps)
    resumed = sum(r["kind"] == "resume" for r in run.starts)
    parts[0] += f", in {format_time(seconds)}" + (f" (taken up again {resumed} time{'s' * (resumed > 1)})" if resumed else "")
    losses = [loss for r in run.validations if (loss := number(r, "loss")) is not None]
    if losses:
        fell = f"went from {losses[0]:.3f} to {losses[-1]:.3f}" if len(losses) > 1 else f"is {losses[0]:.3f}"
        bigram = number(run.first, "bigram")
        beside = f", where counting pairs of tokens gives {bigram:.3f}" if bigram else ""
        parts.append(f"its validation loss {fell} nats a token{beside}")
    peak = max((p for r in run.steps if (p := number(r, "peak_bytes"))), default=None)
    if peak:
        budget = number(run.first, "budget_bytes")
        parts.append(f"a step took {format_bytes(peak)} at most" + (f" of the {format_bytes(budget)} allowed" if budget else ""))
    return "; ".join(parts) + "."


def source_of(run: Run) -> str:
    source, built = run.setting("data", "source"), run.setting("data", "tokens", [])
    if source == "tokens":
        return ", ".join(str(part.get("path")) for part in built[:3]) + (f" and {len(built) - 3} more" if len(built) > 3 else "")
    return {"stdlib": "the Python standard library's source code", "recall": "made-up pairs to recall", None: "its data"}.get(
        source, str(source)
    )


def amount(count: float) -> str:
    """1,234, 56.7 thousand, 8.03 billion."""
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e4, "thousand")):
        if count >= size:
            return f"{count / (1e3 if name == 'thousand' else size):.3g} {name}"
    return f"{count:,.0f}"
