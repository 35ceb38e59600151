"""The plans as a page (HTML, opens from disk) and a picture (PNG, where matplotlib is installed): time against memory."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from longtrain.files import write_whole
from longtrain.page.document import document
from longtrain.planner import explain
from longtrain.planner.explore import Found, Wanted
from longtrain.units import GIB, format_bytes

PAGE, PICTURE = "plan.html", "plan.png"


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
        f"Fits: {format_bytes(best.peak.total + wanted.taken)} of {format_bytes(wanted.room + wanted.taken)} a device, "
        f"{best.time.total:,.1f} s a step, {best.rate:,.0f} tokens a second, {best.utilisation(wanted.machine.peak_flops):.1%} of what the "
        f"device can do; {explain.binding(best, wanted)}."
    )
    drawn = [
        {
            "id": "front", "title": "Time against memory",
            "note": "Plans of which none is both smaller and faster, and the best of every way to use the devices.",
            "x": "GiB at the peak of a step, of one device", "y": "seconds a million tokens", "digits": 4,
            "series": [
                {"name": "Pareto front", "role": "reference", "points": [point(f) for f in front]},
                {"name": "other ways to use the devices", "role": "compared", "dots": True, "points": [point(f) for f in found[1:]]},
                {"name": "the plan", "role": "predicted", "dots": True, "points": [point(best)]},
            ],
            "lines": [], "marks": [],
        }
    ]  # fmt: skip
    parts = {
        "Ways to run the step": explain.table(found, wanted), "Memory": explain.memory(best, wanted), "Time": explain.time(best, wanted),
        "By hand": explain.formulas(best, wanted), "Less memory or less time": explain.front(front, wanted),
    }  # fmt: skip
    texts = "".join(f"<h2>{name}</h2><pre>{escape(chr(10).join(lines))}</pre>" for name, lines in parts.items())
    return document(
        title=f"{name}: plan", heading=name, summary=sentence, drawn=drawn, tables=texts,
        css=".tables h2 { margin-top: 1.5rem; } pre { overflow-x: auto; font-size: 0.8rem; line-height: 1.35; }",
    )  # fmt: skip


def point(found: Found) -> list[float]:
    """GiB of a device, and seconds a million tokens: steps of several replicas have more of them."""
    return [found.peak.total / GIB, 1e6 / found.rate]


def draw(path: Path, title: str, found: Sequence[Found], front: Sequence[Found], wanted: Wanted) -> None:
    """Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*map(point, front), strict=True), marker="o", label="Pareto front")
    if len(found) > 1:
        axes.scatter(*zip(*map(point, found[1:]), strict=True), color="gray", label="other ways to use the devices")
    axes.scatter(*point(found[0]), color="crimson", zorder=3, label="the plan")
    axes.axvline(wanted.room / GIB, color="black", linestyle="--", linewidth=1, label="budget")
    axes.set(
        xlabel="GiB at the peak of a step",
        ylabel="seconds a million tokens",
        title=f"{title}, {wanted.tokens:,} tokens, {wanted.devices} x {wanted.machine.name}",
    )
    axes.legend(frameon=False)
    FigureCanvasAgg(figure)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
