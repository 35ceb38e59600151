"""The timeline as a picture (PNG). Needs matplotlib, the `plot` extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longtrain.files import write_whole
from longtrain.units import GIB

COLOURS = {
    "parameters": "#2f6fb0", "gradients": "#c8622c", "optimizer": "#86589e", "activations": "#3d9668", "carry": "#c9a227",
    "workspace": "#8b95a1", "staging": "#55aad4", "communication": "#c9588a", "data": "#96674a", "other": "#b3bac3",
    "unattributed": "#d21f3c",
}  # fmt: skip
"""Those of page.css."""


def draw(picture: Path, result: dict[str, Any]) -> None:
    """Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    line = result["timeline"]
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots()
    names = [c for c in result["categories"] if c in line["series"]]
    stacked = [[v / GIB for v in line["series"][c]] for c in names]
    axes.stackplot(line["seconds"], stacked, labels=names, colors=[COLOURS[c] for c in names], linewidth=0)
    if result["budget"] and result["device"] != "CPU":
        axes.axhline(result["budget"] / GIB, color="black", linestyle="--", linewidth=1, label="budget")
    before = None
    for band in line["bands"]:
        if band["phase"] != before:
            axes.axvline(band["start"], color="gray", linewidth=0.6)
            axes.annotate(band["phase"], (band["start"], 1.0), xycoords=("data", "axes fraction"), fontsize=8, va="bottom", rotation=30)
        before = band["phase"]
    axes.set_xlabel("seconds")
    axes.set_ylabel("GiB")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", fontsize=8)
    figure.suptitle(f"{result['title']}: peak {result['peak']['bytes'] / GIB:.3f} GiB in {result['peak']['phase']}", fontsize=10)
    FigureCanvasAgg(figure)
    write_whole(picture, lambda path: figure.savefig(path, format="png", dpi=120))
