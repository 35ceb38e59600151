"""A page and its parts as markup: the figures a reader wants first, charts, tables, what is folded away."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

HERE = Path(__file__).parent


def document(
    *, title: str, heading: str, summary: str, numbers: Iterable[tuple[str, str | None, str]] = (), notices: Iterable[str] = (),
    drawn: Sequence[dict], tables: str, above: str = "", css: str = "", end: str = "",
) -> str:  # fmt: skip
    """A whole page that asks no network: `heading`, a sentence, `numbers` (name, value, unit; None: left out), charts (`drawn`), tables.

    `tables`, `above` (the charts) and `end` (more scripts) are markup, `css` is added to the style of all pages.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{(HERE / "page.css").read_text(encoding="utf-8")}{css}</style>
</head>
<body>
<header>
<h1>{escape(heading)}</h1>
<p class="summary">{escape(summary)}</p>
{tiles(numbers)}
</header>
<noscript><p class="notice">The charts are drawn by the script in this page, and scripts are off.
The tables below hold the main figures.</p></noscript>
{"".join(f'<p class="notice">{escape(text)}</p>' for text in notices)}
<main>{above}<div class="charts">{"".join(map(figure, drawn))}</div></main>
<section class="tables">
{tables}
</section>
<script type="application/json" id="charts">{as_script(drawn)}</script>
<script>
{(HERE / "page.js").read_text(encoding="utf-8")}</script>
{end}</body>
</html>
"""


def figure(chart: dict) -> str:
    """Where the script draws a chart."""
    title, note = escape(chart["title"]), escape(chart["note"])
    return f'<figure id="{escape(chart["id"])}"><figcaption><h2>{title}</h2><p>{note}</p></figcaption></figure>'


def as_script(data: object) -> str:
    """JSON that no text in it can end."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def tiles(numbers: Iterable[tuple[str, str | None, str]]) -> str:
    shown = [(escape(name), value, escape(unit)) for name, value, unit in numbers if value]
    cells = "".join(f"<div><dt>{name}</dt><dd>{value} <small>{unit}</small></dd></div>" for name, value, unit in shown)
    return f"<dl>{cells}</dl>" if cells else ""


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f'<details open><summary>{escape(title)}</summary><div class="scroll"><table>{head}<tbody>{body}</tbody></table></div></details>'


def folded(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
