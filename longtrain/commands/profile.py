"""`longtrain profile CONFIG`: two updates of a config's longest stage, predicted and measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from sys import maxsize

import torch

from longtrain.config import Config, ConfigError, Locations, load_config
from longtrain.config.nodes import COMMAND_LINE
from longtrain.files import said_plainly
from longtrain.memory.advice import changes_that_fit
from longtrain.memory.profile import profile
from longtrain.memory.trace import missing
from longtrain.planner.asked import held_beside_model
from longtrain.planner.axes import Axes, on_one_device
from longtrain.planner.cost import peak, step_memory
from longtrain.planner.footprint import ModelFootprint, measure_model
from longtrain.planner.machines import memory_of
from longtrain.planner.shapes import with_wide_gradients
from longtrain.train.budget import share_of
from longtrain.train.console import StepBar
from longtrain.train.distribute import Work, choose_device, make_work
from longtrain.train.loader import open_data
from longtrain.train.model import build_model
from longtrain.train.prepare import Setup, prepare
from longtrain.train.processes import ALONE, Processes
from longtrain.train.schedule import learning_rate, stage_at
from longtrain.train.step import gradients
from longtrain.units import parse_bytes

UPDATES = 2
"""The first makes what lasts (the optimizer's moments); the report shows the one in which most was held."""


def run(
    config_path: str, overrides: Sequence[str], *, out: str | None = None, sampling: bool = False, lengths: Sequence[int] = (),
    processes: Processes = ALONE,
) -> int:  # fmt: skip
    """Profile a config's step; `lengths`: other values of data.seq_len, sampled first where that can be, for the chart of peak against
    length. Every one of `processes` calls it."""
    if sampling and (why := missing()) is not None:
        raise ConfigError(COMMAND_LINE, "--sampling", f"counts what the allocators report, and {why}; leave it out")
    config, where = load_config(config_path, overrides)
    directory = Path(out) if out else Path(config.output.dir) / "memory"
    title = Path(config_path).stem
    with said_plainly(directory):
        directory.mkdir(parents=True, exist_ok=True)
    points = []
    for tokens in lengths:
        alone = [f"data.seq_len={tokens}", f"train.length_schedule=[{{from_step: 0, seq_len: {tokens}}}]"]
        shorter = load_config(config_path, [*overrides, *alone])
        name = f"{title}, T = {tokens:,}"
        points.append(one(*shorter, processes, directory / f"{tokens}", name, sampling=missing() is None, quiet=True))
        print(f"T = {tokens:,}: peak {points[-1]['measured'] / 2**30:.3f} GiB", flush=True)
    one(config, where, processes, directory, title, sampling=sampling, quiet=False, points=points)
    return 0


def one(
    config: Config, where: Locations, processes: Processes, directory: Path, title: str, *, sampling: bool, quiet: bool,
    points: Sequence[dict] = (),
) -> dict[str, int | None]:  # fmt: skip
    """Profile one length; returns its point of the chart."""
    work = make_work(config, where, processes)
    first = max(config.stages(), key=lambda stage: stage.seq_len).from_step
    stage = stage_at(config, first)
    check_data(config, where, stage.seq_len)
    footprint = predictable(config, where, work)
    setup = prepare(config, where, work)
    budget = parse_bytes(config.memory.budget, "memory.budget") if config.memory.budget else None
    share = -(-stage.seq_len // work.context)
    plan = setup.plan and setup.plan.with_chunks(max(1, min(setup.plan.chunk_tokens, stage.seq_len) // work.context))
    predicted = step_memory(footprint, plan, share) if plan and footprint else ()
    top = sum(size for what, size in peak(predicted).items.items() if what != "workspace") if predicted else None
    limit, taken = min(budget or maxsize, memory_of(setup.device)), 0
    if footprint is not None:
        masters = has_masters(config) and work.mesh is None
        taken = held_beside_model(footprint, 4 * footprint.trained * masters * (footprint.optimizer > 0))  # moments are not there yet

    def changes() -> list[str]:
        """Where `limit` did not suffice: of what a plan that was said to fit holds, as much less as was too much, a twentieth at least."""
        room = limit - taken
        if predicted:
            over = watched.result["process"].get("used", 0) - limit
            room = min(room, peak(predicted).total - max(over, top // 20))
        return changes_that_fit(
            footprint, plan, share, room, taken=taken, tiers=config.memory.tiers(), devices=work.context, planned=budget is not None
        )

    watched = profile(
        directory, sampling=sampling, budget=budget, predicted=predicted, changes=changes if footprint else None, title=title, quiet=quiet
    )
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


def check_data(config: Config, where: Locations, tokens: int) -> None:
    """Raise ConfigError for a sequence that would be padding in part whatever it is packed of."""
    if (there := int(open_data(config.data)[0].length_N.sum())) < tokens:
        found = f"{tokens} tokens are more than all training documents together have ({there}), and the rest would be padding"
        raise where.error("data.seq_len", f"{found}; give more data, or at most {there}")


def predictable(config: Config, where: Locations, work: Work = Work()) -> ModelFootprint | None:
    """What the planner's formulas need, of a model that is not streamed yet, with the masters and gradients that its optimizer will have,
    or of one process's share of it; None where they do not cover it, which is said."""
    model, *_ = build_model(config, where, read_weights=False)
    held = sum(p.nbytes for p in model.parameters())
    device = choose_device(config, where, work.processes)
    try:
        found = measure_model(with_wide_gradients(model.to(getattr(torch, config.train.dtype))))
    except ValueError as error:
        print(f"nothing is predicted: {error}")
        return None
    found = replace(found, device=device)
    if work.mesh is not None:
        return share_of(found, held, work)
    place = config.memory.optimizer if device.type == "cuda" else "device"
    return on_one_device(found, Axes(), optimizer=place, masters=has_masters(config))


def has_masters(config: Config) -> bool:
    """Whether float32 weights stand beside the model's own (`longtrain.train.optimizer`)."""
    return config.train.dtype == "bfloat16" or config.memory.optimizer == "host"


def update(setup: Setup, config: Config, step: int) -> None:
    """As training does it."""
    bar = StepBar(sys.stdout)
    batches = setup.loader.update(step)
    bar.begin(f"update {step + 1}", batches[0].input_ids_BT.shape[1], len(batches))
    _, _, norm = gradients(
        setup.model, setup.optimizer, batches, step + 1, setup.device, bar, work=setup.work, seed=config.train.seed
    )
    bar.clear()
    setup.optimizer.update(learning_rate(config.train, step), norm)
