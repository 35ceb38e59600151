"""The plans as a page (HTML, opens from disk) and a picture (PNG, where matplotlib is installed): step time against memory."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from longtrain.planner import explain
from longtrain.planner.explore import Found, Wanted
from longtrain.report.page import document, figures
from longtrain.train.output import write_whole
from longtrain.units import format_bytes

PAGE, PICTURE = "plan.html", "plan.png"
GIB = 2**30


def write(directory: Path, title: str, found: Sequence[Found], front: Sequence[Found], wanted: Wanted) -> list[str]:
    """Names of the files that were written."""
    write_whole(directory / PAGE, lambda path: path.write_text(page(title, found, front, wanted), encoding="utf-8"))
    try:
        draw(directory / PICTURE, title, found, front, wanted)
    except ImportError:
        print("no picture: matplotlib is not installed; get it with: pip install longtrain[plot]")
        return [PAGE]
    return [PAGE, PICTURE]


def page(title: str, found: Sequence[Found], front: Sequence[Found], wanted: Wanted) -> str:
    best = found[0]
    name = f"{title}: {wanted.tokens:,} tokens on {wanted.devices} x {wanted.machine.name}"
    sentence = (
        f"Fits: {format_bytes(best.peak.total)} of {format_bytes(wanted.room)} a device, {best.time.total:,.1f} s a step, {best.rate:,.0f} tokens a "
        f"second, {best.utilisation(wanted.machine.peak_flops):.1%} of what the device can do. {explain.binding(best, wanted).capitalize()}."
    )
    drawn = [
        {
            "id": "front", "title": "Time against memory", "note": "Plans of which none is both smaller and faster, and the best of every way to use "
            "the devices.", "x": "GiB at the peak of a step", "y": "seconds a step", "digits": 4,
            "series": [
                {"name": "Pareto front", "role": "predicted", "points": [[f.peak.total / GIB, f.time.total] for f in front]},
                {"name": "other ways", "role": "reference", "points": [[f.peak.total / GIB, f.time.total] for f in found[1:]]},
            ],
            "lines": [], "marks": [],
        }
    ]  # fmt: skip
    text = "\n\n".join("\n".join(part) for part in (
        explain.table(found, wanted), explain.memory(best, wanted), explain.time(best, wanted), explain.formulas(best, wanted), explain.front(front),
    ))  # fmt: skip
    return document(
        title=f"{name}: plan", header=f'<h1>{escape(name)}</h1>\n<p class="summary">{escape(sentence)}</p>', notices=[],
        main=f'<main class="charts">{figures(drawn)}</main>\n<section class="tables"><pre>{escape(text)}</pre></section>', drawn=drawn,
        css="pre { overflow-x: auto; font-size: 0.8rem; line-height: 1.35; }",
    )  # fmt: skip


def draw(path: Path, title: str, found: Sequence[Found], front: Sequence[Found], wanted: Wanted) -> None:
    """Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([f.peak.total / GIB for f in front], [f.time.total for f in front], marker="o", label="Pareto front")
    if len(found) > 1:
        axes.scatter([f.peak.total / GIB for f in found[1:]], [f.time.total for f in found[1:]], color="gray", label="other ways")
    axes.axvline(wanted.room / GIB, color="black", linestyle="--", linewidth=1, label="budget")
    axes.set(xlabel="GiB at the peak of a step", ylabel="seconds a step", title=f"{title}, {wanted.tokens:,} tokens, {wanted.devices} x {wanted.machine.name}")
    axes.legend(frameon=False)
    FigureCanvasAgg(figure)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
