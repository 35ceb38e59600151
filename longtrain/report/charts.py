"""The charts of the report as data for `page.js`: what is drawn, in which role, against what. A chart without points is left out.

A role has one colour, dash and marker on the whole page: `measured` what the run itself did, `held-out` what it did on held-out documents,
`predicted` what the plan said, `limit` what it is held against, `reference` what stands beside it,
`compared` the other of two runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from longtrain.report.read import Run, number
from longtrain.units import GIB

MOST_POINTS = 1500


def charts(run: Run) -> list[dict]:
    """All that the records allow, in the order of the page."""
    drawn = [loss(run), loss_by_position(run), *probes(run), throughput(run), memory(run), learning_rate(run), gradient_norm(run)]
    return [chart for chart in drawn if any(series["points"] for series in chart["series"])]


def loss(run: Run) -> dict:
    bounds = [(f"{name} counts", number(run.first, name)) for name in ("unigram", "bigram")]
    return {
        "id": "loss",
        "title": "Loss",
        "note": "Training and validation loss, beside what counting tokens and counting pairs of them achieve." + grouped(run),
        "x": "update",
        "y": "nats a token",
        "digits": 4,
        "series": [
            over_steps(run, "training", "measured", "loss"),
            {
                "name": "validation",
                "role": "held-out",
                "points": [[r["step"], value] for r in run.validations if (value := number(r, "loss")) is not None],
            },
        ],
        "lines": [{"name": name, "role": "limit" if i else "reference", "y": y} for i, (name, y) in enumerate(bounds) if y is not None],
        "marks": length_marks(run),
    }


def loss_by_position(run: Run) -> dict:
    last = (run.evaluation or {}).get("positions") or []
    first = (run.validations[0].get("positions") or []) if len(run.validations) > 1 else []
    series = [position_series("now", "held-out", last)]
    if first and first != last:
        series.append(position_series(f"at update {run.validations[0]['step']:,}", "reference", first))
    return {
        "id": "positions",
        "title": "Loss by position",
        "note": "Does the model use its context? Held-out targets by the number of tokens of their own document that stand before "
        "them: where the line falls, more context helps. Bars are one standard error.",
        "x": "tokens before the target",
        "y": "nats a token",
        "digits": 4,
        "log": True,
        "series": series,
    }


def position_series(name: str, role: str, positions: Sequence[dict]) -> dict:
    """A point at the middle (on a logarithmic scale) of each bucket."""
    points = []
    for p in positions:
        if (value := number(p, "loss")) is not None:
            middle = (max(p["start"], p["stop"] / 4, 1) * p["stop"]) ** 0.5
            points.append([middle, value, number(p, "error") or 0, f"{p['start']:,} to {p['stop'] - 1:,}", f"{p['targets']:,} targets"])
    return {"name": name, "role": role, "points": points}


def probes(run: Run) -> list[dict]:
    found = (run.evaluation or {}).get("probes") or []
    said = {
        "recall": "The value of a key that was given before, among other pairs of key and value: how often the model gives the right one.",
        "needle": "The value of a random marker hidden in held-out text: how many of its tokens the model gives right.",
    }
    drawn = []
    for name in dict.fromkeys(p["probe"] for p in found):
        results = sorted((p for p in found if p["probe"] == name), key=lambda p: p["distance"])
        chance = results[0]["chance"]
        points = []
        for p in results:
            error = (max(p["accuracy"] * (1 - p["accuracy"]), 0) / p["answers"]) ** 0.5
            points.append([p["distance"], 100 * p["accuracy"], 100 * error, "", f"{p['answers']:,} answers"])
        drawn.append({
            "id": f"probe-{name}",
            "title": f"Probe: {name}",
            "note": f"{said.get(name, '')} A guess is right {chance:.1%} of the time.",
            "x": "tokens back",
            "y": "% right",
            "digits": 1,
            "log": True,
            "range": [0, 100],
            "series": [{"name": "right", "role": "held-out", "points": points}],
            "lines": [{"name": "chance", "role": "limit", "y": 100 * chance}],
        })  # fmt: skip
    return drawn


def throughput(run: Run) -> dict:
    note = "Tokens of an update over its time: forward, backward and update." + grouped(run)
    return of_updates(run, "throughput", "Throughput", note, "tokens/s", 0, over_steps(run, "measured", "measured", "tokens_per_second"))


def memory(run: Run) -> dict:
    plan = run.first.get("plan") or {}
    bounds = (
        ("predicted by the plan", "predicted", number(plan, "predicted_peak")),
        ("budget", "limit", number(run.first, "budget_bytes")),
    )
    where = "device memory" if str(run.first.get("device", "")).startswith("cuda") else "resident memory of the process"
    note = f"Peak of each update ({where}), against the plan." + grouped(run, "largest")
    peaks = over_steps(run, "peak of the update", "measured", "peak_bytes", scale=1 / GIB, join=max)
    lines = [{"name": name, "role": role, "y": y / GIB} for name, role, y in bounds if y]
    return of_updates(run, "memory", "Memory", note, "GiB", 2, peaks, lines)


def learning_rate(run: Run) -> dict:
    series = [over_steps(run, "learning rate", "measured", "lr")]
    return {"id": "lr", "title": "Learning rate", "note": "", "x": "update", "y": "", "digits": -3, "zero": True, "series": series}


def gradient_norm(run: Run) -> dict:
    clip = run.setting("train", "grad_clip")
    lines = [{"name": "clipped above", "role": "limit", "y": clip}] if clip else []
    note = "Before clipping." + grouped(run)
    return of_updates(run, "grad-norm", "Gradient norm", note, "", 3, over_steps(run, "norm", "measured", "grad_norm"), lines)


def of_updates(run: Run, name: str, title: str, note: str, unit: str, digits: int, series: dict, lines: Sequence[dict] = ()) -> dict:
    """One measured value over the updates, from zero."""
    return {
        "id": name, "title": title, "note": note, "x": "update", "y": unit, "digits": digits, "zero": True, "series": [series],
        "lines": list(lines),
        "marks": length_marks(run),
    }  # fmt: skip


def group_size(run: Run) -> int:
    """How many updates share a point, so that no series has more than MOST_POINTS."""
    return -(-len(run.steps) // MOST_POINTS)


def grouped(run: Run, how: str = "mean") -> str:
    size = group_size(run)
    return f" Each point is the {how} of {size} updates." if size > 1 else ""


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def over_steps(
    run: Run, name: str, role: str, key: str, *, scale: float = 1.0, join: Callable[[Sequence[float]], float] = mean
) -> dict:
    """One value of the step records; updates that lack it leave a gap."""
    size, points = group_size(run), []
    for at in range(0, len(run.steps), size or 1):
        group = run.steps[at : at + size]
        values = [value * scale for r in group if (value := number(r, key)) is not None]
        points.append([group[-1]["step"], join(values) if values else None])
    return {"name": name, "role": role, "points": points if any(y is not None for _, y in points) else []}


def length_marks(run: Run) -> list[dict]:
    """Where the sequence length changes."""
    marks, before = [], None
    for record in run.steps:
        length = number(record, "seq_len")
        if length is not None and before is not None and length != before:
            marks.append({"x": record["step"], "label": f"T = {length:,}"})
        before = length if length is not None else before
    return marks
