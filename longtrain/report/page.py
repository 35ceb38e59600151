"""The page: one sentence, the figures, the charts, the tables, all in one file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from longtrain.files import said_plainly, write_whole
from longtrain.page.document import document, folded, table
from longtrain.report.charts import charts
from longtrain.report.read import Run, amount, count_parameters, number, read_run, sentence
from longtrain.train.output import REPORT
from longtrain.units import format_bytes, format_time


def run(directory: str, out: str | None = None) -> int:
    """Write the report of a run's directory, `report.html` in it unless `out` says where. Raises RunError without metrics."""
    found = read_run(Path(directory))
    path = Path(out) if out else Path(directory) / REPORT
    with said_plainly(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: temporary.write_text(page(found), encoding="utf-8"))
    print(f"{sentence(found)}\n{path}")
    return 0


def page(found: Run) -> str:
    return document(
        title=f"{found.name}: run report",
        heading=found.name,
        summary=sentence(found),
        numbers=numbers(found),
        notices=notices(found),
        drawn=charts(found),
        tables=tables(found),
    )


def numbers(found: Run) -> list[tuple[str, str | None, str]]:
    """The figures a reader wants first."""
    last = found.evaluation or {}
    speeds = sorted(speed for r in found.steps if (speed := number(r, "tokens_per_second")) is not None)
    peak = max((p for r in found.steps if (p := number(r, "peak_bytes"))), default=None)
    budget, parameters = number(found.first, "budget_bytes"), count_parameters(found)
    shares = sorted(share for r in found.steps if (share := number(r, "mfu")) is not None)
    return [
        ("parameters", amount(parameters) if parameters else None, ""),
        (
            "loss, last evaluation" if last.get("kind") == "evaluation" else "validation loss",
            f"{value:.4f}" if (value := number(last, "loss")) is not None else None,
            "nats a token",
        ),
        ("throughput, median", f"{speeds[len(speeds) // 2]:,.0f}" if speeds else None, "tokens/s"),
        ("model FLOPs used, median", f"{shares[len(shares) // 2]:.1%}" if shares else None, ""),
        ("peak memory", format_bytes(peak) if peak else None, f"of {format_bytes(budget)}" if budget else ""),
        ("longest sequence", f"{max((number(r, 'seq_len') or 0 for r in found.steps), default=0):,.0f}" if found.steps else None, "tokens"),
    ]


def notices(found: Run) -> Iterable[str]:
    """What a reader should know before believing the charts."""
    planned = found.setting("train", "steps")
    done = found.steps[-1]["step"] if found.steps else 0
    if found.result is None:
        yield f"The run has not ended: {done:,}" + (f" of {planned:,} updates are" if planned else " updates are") + " recorded."
    if found.broken:
        lines = ", ".join(map(str, found.broken[:5])) + (" and more" if len(found.broken) > 5 else "")
        yield f"Left out: line {lines} of the metrics file, which is no record (the last one may be half written)."
    if found.others:
        yield "Not shown: records of other kinds, " + ", ".join(f"{count} {kind}" for kind, count in found.others.items()) + "."


def tables(found: Run) -> str:
    parts = []
    last = found.evaluation or {}
    positions, sources, asked = last.get("positions"), last.get("sources"), last.get("probes")
    if positions:
        rows = [(f"{p['start']:,} to {p['stop'] - 1:,}", f"{p['loss']:.4f}", standard_error(p), f"{p['targets']:,}") for p in positions]
        parts.append(table("Loss by position", ("position", "nats a token", "standard error", "targets"), rows))
    if sources:
        rows = [(p["source"], f"{p['loss']:.4f}", standard_error(p), f"{p['targets']:,}") for p in sources]
        parts.append(table("Loss by source", ("source", "nats a token", "standard error", "targets"), rows))
    if asked:
        rows = [(p["probe"], f"{p['distance']:,}", f"{p['accuracy']:.1%}", f"{p['chance']:.1%}", f"{p['answers']:,}") for p in asked]
        parts.append(table("Probes", ("probe", "tokens back", "right", "chance", "answers"), rows))
    if found.validations:
        rows = [(f"{r['step']:,}", f"{loss:.4f}") for r in found.validations if (loss := number(r, "loss")) is not None]
        parts.append(table("Validations", ("update", "nats a token"), rows))
    if found.events:
        parts.append(table("Events", ("update", "what", "details"), [event(r) for r in found.events]))
    plan = found.first.get("plan")
    if plan:
        parts.append(table("Plan", ("setting", "value"), [(k, say(k, v)) for k, v in plan.items() if v is not None]))
    hidden = {"kind", "unigram", "bigram", "plan", "doctor", "config", "notes", "dropped", "dropped_steps", "checkpoint", "changed", "step"}
    rows = [(k.replace("_", " "), say(k, v)) for k, v in found.first.items() if k not in hidden]
    parts.append(table("Versions and machine", ("", ""), rows) if rows else "")
    doctor = found.first.get("doctor")
    if doctor:
        parts.append(folded("What longtrain doctor said", "\n".join(map(str, doctor))))
    if found.config_text:
        parts.append(folded("Resolved configuration", found.config_text))
    return "\n".join(parts)


def standard_error(part: dict) -> str:
    return f"{error:.4f}" if (error := number(part, "error")) is not None else ""


def event(record: dict) -> tuple[str, str, str]:
    details = {k: v for k, v in record.items() if k in ("reason", "found", "notes", "bytes", "seconds") and v}
    text = "; ".join(f"{k} {say(k, v)}" if k in ("bytes", "seconds") else say(k, v) for k, v in details.items())
    return f"{record.get('step', 0):,}", record["kind"], text


def say(key: str, value) -> str:
    """A value of a record as a reader wants it."""
    if isinstance(value, (list, tuple)):
        return (" " if key == "command" else ", ").join(say(key, v) for v in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if key.endswith("bytes") or key == "predicted_peak":
            return format_bytes(value)
        if key == "seconds":
            return format_time(value) if value >= 60 else f"{value:.1f} s"
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    return str(value)
