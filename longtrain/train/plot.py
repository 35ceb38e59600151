"""The picture of a run: loss with validation and counting baselines above, memory below. Needs matplotlib (the `plot` extra)."""

from __future__ import annotations

from pathlib import Path

from longtrain.files import write_whole
from longtrain.train.output import read_metrics


def plot_run(metrics: Path, picture: Path) -> None:
    """Draw a metrics file into a PNG. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    run = next(r for r in records if r["kind"] == "run")
    steps = [r for r in records if r["kind"] == "step"]
    validations = [r for r in records if r["kind"] == "validation"]

    figure = Figure(figsize=(9, 7), layout="constrained")
    loss_axes, memory_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    at = [r["step"] for r in steps]
    loss_axes.plot(at, [r["loss"] for r in steps], color="tab:blue", linewidth=0.8, label="training loss")
    loss_axes.plot(
        [r["step"] for r in validations], [r["loss"] for r in validations], "o-", color="tab:orange", markersize=4, label="validation loss"
    )
    for name, style in (("unigram", ":"), ("bigram", "--")) if "unigram" in run else ():
        loss_axes.axhline(run[name], color="gray", linestyle=style, linewidth=1, label=f"{name} counts, {run[name]:.3f}")
    for before, after in zip(steps, steps[1:], strict=False):
        if before["seq_len"] != after["seq_len"]:
            loss_axes.axvline(after["step"], color="lightgray", linewidth=1)
            loss_axes.annotate(f"T = {after['seq_len']:,}", (after["step"], 0.97), xycoords=("data", "axes fraction"), va="top")
    loss_axes.set_ylabel("nats per token")
    loss_axes.legend()

    memory_axes.plot(at, [r["peak_bytes"] / 2**30 for r in steps], color="tab:green", linewidth=1, label="peak of the step")
    if run["budget_bytes"]:
        memory_axes.axhline(run["budget_bytes"] / 2**30, color="tab:red", linestyle="--", linewidth=1, label="budget")
    memory_axes.set_ylim(bottom=0)
    memory_axes.set_ylabel("GiB")
    memory_axes.set_xlabel("update")
    memory_axes.legend()
    FigureCanvasAgg(figure)
    write_whole(picture, lambda path: figure.savefig(path, format="png", dpi=120))
