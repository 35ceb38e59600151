"""The plan of a run: the planner's for `memory.budget`, or what the configuration says by hand.

Of several processes each has a share of the model, of the sequence, or of both, and the budget is that of each of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import longtrain as lt
from longtrain.config import Config, Locations
from longtrain.config.hf import HfModelConfig
from longtrain.plan import InfeasibleBudget
from longtrain.planner.axes import Axes, on_one_device
from longtrain.planner.footprint import ModelFootprint, measure_model
from longtrain.planner.rates import usual_rates
from longtrain.planner.search import Asked, fastest_plan, held_beside_model, what_to_change
from longtrain.planner.shapes import on_meta, with_wide_gradients
from longtrain.train.distribute import Work
from longtrain.train.model import build_model
from longtrain.train.schedule import step_count
from longtrain.units import parse_bytes


def make_plan(model: nn.Module, config: Config, where: Locations, work: Work = Work()) -> lt.Plan | None:
    """None: nothing is streamed. One process makes it when its optimizer has cast the model; several, before they keep parts of it."""
    if config.memory.budget is not None:
        try:
            return of_one(model, config) if work.mesh is None else of_several(model, config, where, work)
        except ValueError as error:  # nothing fits, or a layer cannot be streamed
            raise where.error("memory.budget", str(error)) from None
    if settings := config.memory.plan_settings():
        return lt.Plan(**settings)
    return None if work.context == 1 else lt.Plan(chunk_tokens=config.data.seq_len)  # what is shared is streamed: all of it is one chunk


def of_one(model: nn.Module, config: Config) -> lt.Plan:
    """Raises ValueError."""
    here = config.memory.optimizer == "device" or next(model.parameters()).device.type == "cpu"
    return lt.plan(
        model, seq_len=config.data.seq_len, budget=config.memory.budget, tiers=config.memory.tiers(), steps=step_count(config),
        optimizer_bytes_per_parameter=8 * here,  # AdamW's moments
    )  # fmt: skip


def of_several(model: nn.Module, config: Config, where: Locations, work: Work) -> lt.Plan:
    """For the share of one of them, the same for all. `model` is whole, on the CPU, in float32 (frozen weights in the training dtype).
    Raises ValueError."""
    device, room = torch.device(work.mesh.device_type), parse_bytes(config.memory.budget)
    held = sum(p.nbytes for p in model.parameters())
    with torch.random.fork_rng(devices=[]):
        whole = footprint_of(config, where)
    whole = replace(whole, device=device)
    beside = held_beside_model(replace(whole, parameters=held if device.type == "cpu" else 0))
    taken = int(work.processes.greatest([beside])[0])
    share, tokens = share_of(whole, held, work), -(-config.data.seq_len // work.context)
    asked = Asked(share, tokens, 1, config.memory.tiers(), usual_rates(device), step_count(config), work.context)
    if (found := fastest_plan(asked, room - taken)) is None:
        raise InfeasibleBudget(f"each of {work.processes.size} processes: {what_to_change(asked, room, taken)}")
    chunk = min(found.chunk_tokens * work.context, config.data.seq_len)
    return replace(found.with_chunks(chunk), predicted_peak=found.predicted_peak + taken)


def share_of(whole: ModelFootprint, held: int, work: Work) -> ModelFootprint:
    """What one of several processes has: its part of the parameters as they are, of which all take `held` bytes, AdamW's moments of them,
    and in the training dtype what is gathered."""
    axes = Axes(sequence=work.context, replicas=work.kept // work.context)
    return replace(on_one_device(whole, axes, optimizer="device", masters=False), parameters=held // work.kept)


def footprint_of(config: Config, where: Locations) -> ModelFootprint:
    """Of a config's model as it trains: longtrain's own from its shape alone, others probed."""
    dtype = getattr(torch, config.train.dtype)
    try:
        if not isinstance(config.model, HfModelConfig) and config.model.layers is None:
            return measure_model(on_meta(config.model, dtype))  # other mixers than attention cannot run on shapes alone
        model, *_ = build_model(config, where, read_weights=False)
        return measure_model(with_wide_gradients(model.to(dtype)))
    except ValueError as error:
        raise where.error("model", f"{error}; train it without the section memory") from None
