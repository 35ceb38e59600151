"""`longtrain profile CONFIG`: one update of a config's longest stage, predicted and measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from longtrain.config import Config, Locations, load_config
from longtrain.files import said_plainly
from longtrain.memory.advice import changes_that_fit
from longtrain.memory.profile import profile
from longtrain.planner.asked import held_beside_model
from longtrain.planner.axes import Axes, on_one_device
from longtrain.planner.cost import peak, step_memory
from longtrain.planner.footprint import ModelFootprint, measure_model
from longtrain.planner.shapes import with_wide_gradients
from longtrain.train.console import StepBar
from longtrain.train.distribute import choose_device
from longtrain.train.model import build_model
from longtrain.train.prepare import Setup, prepare
from longtrain.train.schedule import learning_rate, stage_at
from longtrain.train.step import gradients
from longtrain.units import parse_bytes

UPDATES = 2
"""The first makes what lasts (the optimizer's moments); the report shows the one in which most was held."""


def run(config_path: str, overrides: Sequence[str], *, out: str | None = None, sampling: bool = False, lengths: Sequence[int] = ()) -> int:
    """Profile a config's step; `lengths`: other values of data.seq_len, sampled first, for the chart of peak against length."""
    config, where = load_config(config_path, overrides)
    directory = Path(out) if out else Path(config.output.dir) / "memory"
    title = Path(config_path).stem
    with said_plainly(directory):
        directory.mkdir(parents=True, exist_ok=True)
    points = []
    for tokens in lengths:
        alone = [f"data.seq_len={tokens}", f"train.length_schedule=[{{from_step: 0, seq_len: {tokens}}}]"]
        shorter, at = load_config(config_path, [*overrides, *alone])
        points.append(one(shorter, at, directory / f"{tokens}", f"{title}, T = {tokens:,}", sampling=True, quiet=True))
        print(f"T = {tokens:,}: peak {points[-1]['measured'] / 2**30:.3f} GiB", flush=True)
    one(config, where, directory, title, sampling=sampling, quiet=False, points=points)
    return 0


def one(
    config: Config, where: Locations, directory: Path, title: str, *, sampling: bool, quiet: bool, points: Sequence[dict] = ()
) -> dict[str, int | None]:
    """Profile one length; returns its point of the chart."""
    footprint = predictable(config, where)
    setup = prepare(config, where)
    stages = config.stages()
    first = max(stages, key=lambda stage: stage.seq_len).from_step
    stage = stage_at(config, first)
    budget = parse_bytes(config.memory.budget, "memory.budget") if config.memory.budget else None
    predicted, changes = (), None
    if setup.plan is not None and footprint is not None:
        predicted = step_memory(footprint, setup.plan, stage.seq_len)
        if budget is not None:
            counted = 4 * footprint.trained * has_masters(config) * (footprint.optimizer > 0)  # masters are there, moments not yet
            room = budget - held_beside_model(footprint, counted)
            changes = partial(changes_that_fit, footprint, setup.plan, stage.seq_len, room, tiers=config.memory.tiers())
    top = sum(size for what, size in peak(predicted).items.items() if what != "workspace") if predicted else None
    watched = profile(directory, sampling=sampling, budget=budget, predicted=predicted, changes=changes, title=title, quiet=quiet)
    point = {"tokens": stage.seq_len, "predicted": top, "measured": None}
    with watched:
        setup.set_rotary(stage)
        for step in range(first, first + UPDATES):
            update(setup, config, step)
    point["measured"] = watched.result["peak"]["bytes"]
    if points:
        watched.result["lengths"] = [*points, point]
        watched.write(table_too=False)
    return point


def predictable(config: Config, where: Locations) -> ModelFootprint | None:
    """What the planner's formulas need, of a model that is not streamed yet, with the masters and gradients that its optimizer will have;
    None where they do not cover it, which is said."""
    model, *_ = build_model(config, where, read_weights=False)
    device = choose_device(config, where)
    try:
        found = measure_model(with_wide_gradients(model.to(getattr(torch, config.train.dtype))))
    except ValueError as error:
        print(f"nothing is predicted: {error}")
        return None
    place = config.memory.optimizer if device.type == "cuda" else "device"
    return on_one_device(replace(found, device=device), Axes(), optimizer=place, masters=has_masters(config))


def has_masters(config: Config) -> bool:
    """Whether float32 weights stand beside the model's own (`longtrain.train.optimizer`)."""
    return config.train.dtype == "bfloat16" or config.memory.optimizer == "host"


def update(setup: Setup, config: Config, step: int) -> None:
    """As training does it."""
    bar = StepBar(sys.stdout)
    batches = setup.loader.update(step)
    bar.begin(f"update {step + 1}", batches[0].input_ids_BT.shape[1], len(batches))
    _, _, norm = gradients(setup.model, setup.optimizer, batches, step + 1, setup.device, bar)
    bar.clear()
    setup.optimizer.update(learning_rate(config.train, step), norm)
