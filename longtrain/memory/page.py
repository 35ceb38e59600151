"""The report as one page that opens from disk: the sentence, the timeline, the tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from longtrain.memory.table import closing, describe_error, gib
from longtrain.page.document import as_script, document, folded, table
from longtrain.units import GIB

HERE = Path(__file__).parent
ITEM_COLUMNS = {
    "category": "category", "what": "name", "module": "module", "what would reduce it": "remedy", "shape": "shape", "dtype": "dtype",
    "line": "line",
}  # fmt: skip
"""Of the largest items: title of the column, and where it is in an item."""


def write_page(path: Path, result: dict[str, Any]) -> None:
    path.write_text(page(result), encoding="utf-8")


def page(result: dict[str, Any]) -> str:
    note = "One step, the one in which most was held. Every moment shows the most of its stretch; point at it to see what held it."
    timeline = f'<figure id="timeline" class="wide"><figcaption><h2>Memory over a step</h2><p>{note}</p></figcaption></figure>'
    seen = {key: result[key] for key in ("categories", "timeline", "budget", "device", "sentence")}
    script = (HERE / "page.js").read_text(encoding="utf-8")
    title = f"{result['title']}: memory"
    return document(
        title=title,
        heading=title,
        summary=result["sentence"],
        numbers=numbers(result),
        notices=notices(result),
        above=timeline,
        drawn=charts(result),
        tables=ranks(result) + tables(result),
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        end=f'<script type="application/json" id="profile">{as_script(seen)}</script>\n<script>\n{script}</script>\n',
    )


def numbers(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The figures a reader wants first."""
    peak, process = result["peak"], result["process"]
    beside = "resident, at most" if result["device"] == "CPU" else "used on the device"
    return [
        ("peak, allocated", gib(peak["bytes"]), f"GiB, in {peak['phase']}"),
        ("unattributed", f"{peak['unattributed'] / max(peak['bytes'], 1):.2%}", f"{gib(peak['unattributed'])} GiB"),
        ("reserved", gib(process.get("reserved")), "GiB"),
        (beside, gib(process.get("used")), f"GiB, {gib(process.get('used_at_start'))} at the begin"),
        ("budget", gib(result["budget"]), "GiB"),
    ]


def notices(result: dict[str, Any]) -> Iterable[str]:
    if failure := result["failure"]:
        yield f"The program failed in {failure['phase']}: {failure['error']}. What is shown is what was held until then."
    if result["changes"]:
        yield "What would fit, the cheapest first: " + "; ".join(result["changes"]) + "."
    if result["scratch_unseen"]:
        yield f"Scratch memory inside kernels was not seen: {result['missing']}."
    if result["mode"] == "sampling":
        yield "Sampled: blocks are known by module and phase; a complete profile knows operations and lines too."


def charts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Peak against T, where other lengths were tried."""
    points = {what: [[p["tokens"], p[what] / GIB] for p in result["lengths"] if p[what]] for what in ("predicted", "measured")}
    if not points["measured"]:
        return []
    series = [
        {"name": "predicted", "role": "predicted", "points": points["predicted"]},
        {"name": "measured", "role": "measured", "points": points["measured"], "dots": True},
    ]
    lines = [{"name": "budget", "role": "limit", "y": result["budget"] / GIB}] if result["budget"] and result["device"] != "CPU" else []
    note = "Peak of what a step allocates against the tokens of its sequence: as the plan predicts it, and measured."
    return [{
        "id": "lengths", "title": "Peak against length", "note": note, "x": "tokens", "y": "GiB", "digits": 3, "zero": True,
        "series": series, "lines": lines,
    }]  # fmt: skip


def ranks(result: dict[str, Any], *, names: Sequence[str] = (), title: str = "Ranks at their peaks") -> str:
    """A strip for each rank: what its peak is made of."""
    most = max((rank["bytes"] for rank in result["ranks"]), default=0)
    if not most:
        return ""
    strips = []
    for number, rank in enumerate(result["ranks"]):
        parts = "".join(
            f'<i style="width:{100 * size / most:.2f}%;background:var(--{c})" title="{c} {gib(size)} GiB"></i>'
            for c, size in rank["by_category"].items()
        )
        name = names[number] if names else f"rank {number}"
        strips.append(f'<div class="rank"><span>{escape(name)}: {gib(rank["bytes"])} GiB</span><div class="bar">{parts}</div></div>')
    return f"<details open><summary>{escape(title)}</summary>{''.join(strips)}</details>"


def tables(result: dict[str, Any]) -> str:
    phases = [
        (row["phase"], gib(row["predicted"]), gib(row["measured"]), describe_error(row), row.get("largest", ""), row.get("remedy", ""))
        for row in result["phases"]
    ]
    items = [(gib(i["bytes"]), str(i["count"]), *(unbroken(i[key]) for key in ITEM_COLUMNS.values())) for i in result["peak"]["items"]]
    categories = [(c, gib(size), f"{size / max(result['peak']['bytes'], 1):.1%}") for c, size in result["peak"]["by_category"].items()]
    facts = [(key, str(result[key])) for key in ("command", "mode", "torch", "threads", "device") if result.get(key) is not None]
    header = ("phase", "predicted, GiB", "measured, GiB", "error %", "largest item", "what would reduce it")
    return "\n".join([
        table(f"At the peak: the {len(items)} largest", ("GiB", "blocks", *ITEM_COLUMNS), items),
        table("At the peak, by category", ("category", "GiB", "share"), categories),
        table("Phases", header, phases),
        folded("How the ledger closes", closing(result)),
        table("How this was made", ("", ""), facts),
    ])  # fmt: skip


def unbroken(text: str) -> str:
    """A shape on one line."""
    return text.replace(", ", ",\u00a0") if text.startswith("[") else text
