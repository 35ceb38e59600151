"""`longtrain compare A B`: two profiles on one axis, and what the difference is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longtrain.columns import columns
from longtrain.errors import RunError
from longtrain.files import write_whole
from longtrain.memory.page import HERE, ranks
from longtrain.memory.profile import DATA
from longtrain.memory.table import gib
from longtrain.page.document import document
from longtrain.page.document import table as html_table
from longtrain.units import GIB

PAGE = "comparison.html"
MOST = 20


def run(a: str, b: str, out: str | None = None) -> int:
    """Print the comparison and write its page, into B's directory unless `out` says where. Raises RunError where one is no profile."""
    first, second = read(Path(a)), read(Path(b))
    path = Path(out) if out else (Path(b) if Path(b).is_dir() else Path(b).parent) / PAGE
    print(table(first, second))
    write_whole(path, lambda temporary: temporary.write_text(page(first, second), encoding="utf-8"))
    print(f"\n{path}")
    return 0


def read(path: Path) -> dict[str, Any]:
    """A profile by its directory or its JSON file."""
    file = path / DATA if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {**found, "title": found["title"], "peak": found["peak"]}
    except FileNotFoundError:
        raise RunError(f"{path} holds no {DATA}; name a directory that lt.profile or longtrain profile has written") from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{file} is no profile; name a directory that lt.profile or longtrain profile has written") from None


def difference(a: dict[str, int], b: dict[str, int]) -> list[tuple[str, int, int]]:
    """(name, bytes in a, bytes in b), the largest difference first."""
    names = {**a, **b}
    return sorted(((n, a.get(n, 0), b.get(n, 0)) for n in names), key=lambda row: -abs(row[2] - row[1]))


def items_of(result: dict[str, Any]) -> dict[str, int]:
    """The named items at the peak, without their lines: code moves, what it holds does not."""
    found: dict[str, int] = {}
    for item in result["peak"]["items"]:
        name = f"{item['category']}: {item['name']}" + (f" in {item['module']}" if item["module"] else "")
        found[name] = found.get(name, 0) + item["bytes"]
    return found


def phases_of(result: dict[str, Any]) -> dict[str, int]:
    return {row["phase"]: row["measured"] for row in result["phases"] if row["measured"]}


def sentence(a: dict[str, Any], b: dict[str, Any]) -> str:
    before, after = a["peak"]["bytes"], b["peak"]["bytes"]
    rows = difference(a["peak"]["by_category"], b["peak"]["by_category"])
    if before == after and not any(x != y for _, x, y in rows):
        return f"Both peak at {gib(before)} GiB, made of the same."
    name, x, y = rows[0]
    return (
        f"{b['title']} peaks at {gib(after)} GiB where {a['title']} peaks at {gib(before)} GiB ({signed(after - before)} GiB); "
        f"above all {name}, {signed(y - x)} GiB."
    )


def signed(size: int) -> str:
    return f"{size / GIB:+.3f}"


def rows_of(values: list[tuple[str, int, int]]) -> list[tuple[str, str, str, str]]:
    return [(name, gib(x), gib(y), signed(y - x)) for name, x, y in values[:MOST]]


def parts(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    peaks = difference(a["peak"]["by_category"], b["peak"]["by_category"])
    peaks.append(("in all", a["peak"]["bytes"], b["peak"]["bytes"]))
    phases = [row for row in difference(phases_of(a), phases_of(b)) if row[1] and row[2]]
    return [
        ("At the peaks, by category", rows_of(peaks)),
        ("At the peaks, the largest differences", rows_of(difference(items_of(a), items_of(b)))),
        ("Phases that both have", rows_of(phases)),
    ]


def table(a: dict[str, Any], b: dict[str, Any]) -> str:
    shown = [sentence(a, b)]
    for title, rows in parts(a, b):
        if rows:
            shown += ["", f"{title} (GiB)", columns(("", a["title"], b["title"], "difference"), rows, right=(1, 2, 3))]
    return "\n".join(shown)


def page(a: dict[str, Any], b: dict[str, Any]) -> str:
    note = "Everything that was held in the step of each profile in which most was; the steps begin together."
    drawn = [{
        "id": "both", "title": "Memory over a step", "note": note, "x": "milliseconds", "y": "GiB", "digits": 3, "zero": True,
        "series": [over_time(a, "compared"), over_time(b, "measured")],
    }]  # fmt: skip
    strips = ranks({"ranks": [a["peak"], b["peak"]]}, names=[a["title"], b["title"]], title="What the peaks are made of")
    tables = "".join(html_table(f"{title} (GiB)", ("", a["title"], b["title"], "difference"), rows) for title, rows in parts(a, b) if rows)
    title = f"{a['title']} and {b['title']}: memory"
    return document(
        title=title,
        heading=title,
        summary=sentence(a, b),
        notices=[f"{r['title']} failed in {r['failure']['phase']}: {r['failure']['error']}." for r in (a, b) if r["failure"]],
        drawn=drawn,
        tables=strips + tables,
        css=(HERE / "page.css").read_text(encoding="utf-8"),
    )


def over_time(result: dict[str, Any], role: str) -> dict[str, Any]:
    line = result["timeline"]
    points = [[1000 * t, size / GIB] for t, size in zip(line["seconds"], line["level"], strict=True)]
    return {"name": result["title"], "role": role, "points": points}
