"""Recall at distances beyond every window: train the models of some configs, then how often each gives the value of a key seen before.

    python tools/compare_recall.py                                         # a hybrid, and the same with windows only; about 3 minutes
    python tools/compare_recall.py --set train.steps=20 eval.examples=8 --dir out/try      # does it run?

A run that has finished with just these settings is not repeated. The picture is for people: accuracy by distance, chance, and how far the
windows reach, all layers together. Accuracies are of the probe `recall` (docs/report.md).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from longtrain.config import dump_config, load_config
from longtrain.files import write_whole
from longtrain.nn import ModelConfig
from longtrain.train import run
from longtrain.train.output import CONFIG, METRICS, finished_at, read_metrics

CONFIGS = ("configs/recall_hybrid.yaml", "configs/recall_windows.yaml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """What one run came to: accuracy by distance, chance, and how many tokens back its layers reach together (None: all of them)."""

    name: str
    kinds: tuple[str, ...]
    reach: int | None
    chance: float
    accuracy: dict[int, float]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=CONFIGS, metavar="CONFIG", help=f"runs with the probe recall ({' '.join(CONFIGS)})")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="settings that replace those of all of them")
    parser.add_argument("--dir", default="out", help="where the runs write, each in a directory of its config's name (out)")
    parser.add_argument("--picture", default="out/recall.png", help="where to draw (out/recall.png)")
    args = parser.parse_args(argv)
    found = [trained(Path(path), args.dir, args.set) for path in args.configs]
    print(table(found))
    try:
        draw(found, Path(args.picture))
    except ImportError:
        print("no picture: that needs matplotlib, pip install longtrain[plot]")
    return 0


def trained(path: Path, directory: str, overrides: list[str]) -> Recall:
    """Train as the config says, unless that is done."""
    config, where = load_config(path, [*overrides, f"output.dir={directory}/{path.stem}"])
    out = Path(config.output.dir)
    if finished_at(out) is None or (out / CONFIG).read_text(encoding="utf-8") != dump_config(config):
        if status := run(config, where):
            sys.exit(status)
    *_, last = (r for r in read_metrics(out / METRICS) if r["kind"] == "validation")
    probes = [p for p in last.get("probes", ()) if p["probe"] == "recall"]
    if not probes:
        sys.exit(f"{path} asks no recall; add eval.probes: [recall]")
    kinds = tuple(map(config.model.layer_kind, range(config.model.num_layers)))
    return Recall(
        name=path.stem, kinds=kinds, reach=reach(config.model), chance=probes[0]["chance"],
        accuracy={p["distance"]: p["accuracy"] for p in probes},
    )  # fmt: skip


def reach(model: ModelConfig) -> int | None:
    """How many tokens back the layers see together; None where one of them sees the whole document."""
    back = 0
    for index in range(model.num_layers):
        kind = model.layer_kind(index)
        if kind not in ("window", "conv") or kind == "conv" and model.conv_implicit:
            return None
        back += (model.conv_taps if kind == "conv" else model.layer_window(index)) - 1
    return back


def table(found: list[Recall]) -> str:
    """A line a run, and chance, by distance."""
    distances = sorted({d for r in found for d in r.accuracy})
    lines = [f"{'tokens back':<18} {'layers':<28} {'reach':>7}" + "".join(f"{d:>8,}" for d in distances)]
    for r in found:
        right = "".join(f"{r.accuracy[d]:>8.1%}" if d in r.accuracy else f"{'':>8}" for d in distances)
        lines.append(f"{r.name:<18} {', '.join(r.kinds):<28} {'all' if r.reach is None else r.reach:>7}{right}")
    lines.append(f"{'chance':<18} {'':<28} {'':>7}" + f"{found[0].chance:>8.1%}" * len(distances))
    return "\n".join(lines)


def draw(found: list[Recall], picture: Path) -> None:
    """Accuracy by distance. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for r, marker in zip(found, "os^Dvx" * len(found), strict=False):
        (line,) = axes.plot(list(r.accuracy), list(r.accuracy.values()), marker=marker, label=f"{r.name}: {', '.join(r.kinds)}")
        if r.reach is not None:
            axes.axvline(r.reach, color=line.get_color(), linestyle=":", linewidth=1, label=f"{r.name} reaches {r.reach} tokens")
    axes.axhline(found[0].chance, color="gray", linestyle="--", linewidth=1, label=f"chance, {found[0].chance:.1%}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens back", ylabel="right answers", ylim=(0, 1.05), title="Recall of a key's value")
    axes.legend(loc="center right")
    FigureCanvasAgg(figure)
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_whole(picture, lambda path: figure.savefig(path, format="png", dpi=120))


if __name__ == "__main__":
    sys.exit(main())
