"""The search: the fastest plan whose predicted peak fits the budget, or what to change when none does.

For every chunk and segment length, `placement.choose` decides for every layer what of its tensors is stored and where; the fastest of
those plans that keeps to every budget by the formulas of `cost.py` and `tiers.py` is the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf

import numpy as np
import torch
from torch import nn

from longtrain.plan import SPLITS, STAY, InfeasibleBudget, Offload, Plan, Split
from longtrain.planner.asked import FRACTIONS, Asked, candidates, held_beside_model, state_bytes
from longtrain.planner.footprint import ModelFootprint, measure_model
from longtrain.planner.placement import Option, Problem, choose, step_seconds
from longtrain.planner.rates import Rates, usual_rates
from longtrain.planner.seconds import layer_seconds, mixed_again, restored_seconds
from longtrain.planner.smallest import what_to_change
from longtrain.units import parse_bytes

SHARES = (0.75, 0.5, 0.25, 0.0)
"""Of a tensor's tokens, that stay on the device where the others leave."""


def plan(
    model: nn.Module,
    seq_len: int,
    budget: str | int,
    *,
    batch: int = 1,
    optimizer_bytes_per_parameter: int = 8,
    optimizer: torch.optim.Optimizer | None = None,
    tiers: Offload | None = None,
    rates: Rates | None = None,
    steps: int | None = None,
) -> Plan:
    """The fastest plan for steps of `batch` x `seq_len` tokens within `budget`.

        plan = lt.plan(model, seq_len=131_072, budget="72GiB")

    budget: bytes, or text such as "72GiB" or "80GB". On a GPU, device memory; on a CPU, resident memory of this process, of which
    what it holds now beside the model (imports, data) counts as taken. `optimizer_bytes_per_parameter`: AdamW's two float32 moments;
    `optimizer`: the one that will step, so that what it holds already, after its first step, is not counted twice.
    `tiers`: slower tiers that may be used (`host_bytes`, `disk`, `staging_bytes` of an `lt.Offload`; its splits are chosen here, layer by
    layer): what leaves the device is what costs the least time, transfers that hide behind compute none. `rates`: FLOP/s and bytes/s of
    this machine, usual ones when not given. `steps`: of the run, which `tiers.disk.max_written` is for; one step when not given.

    Returns a `Plan` with `predicted_peak`. Raises InfeasibleBudget naming the cheapest changes that fit, ValueError for a model
    without streamable layers or a budget that cannot be read.
    """
    for name, number in (("seq_len", seq_len), ("batch", batch), ("steps", 1 if steps is None else steps)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, found {number!r}")
    room = parse_bytes(budget)
    footprint = measure_model(model, optimizer_bytes_per_parameter)
    states = 0 if optimizer is None else state_bytes(optimizer)
    taken = held_beside_model(footprint, states + sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
    asked = Asked(footprint, seq_len, batch, tiers, rates or usual_rates(footprint.device), steps or 1)
    found = fastest_plan(asked, room - taken)
    if found is not None:
        return replace(found, predicted_peak=found.predicted_peak + taken)
    raise InfeasibleBudget(what_to_change(asked, room, taken))


Moves = Sequence[tuple[int, int, int]]
"""(stretch of the step, writes, reads) of what is away."""

Saved = Sequence[tuple[int, float]]
"""(stretch of the step, seconds of compute that need not be done)."""


def fastest_plan(asked: Asked, room: int) -> Plan | None:
    """Without slower tiers, and with them where they are given: their staging may cost more than they free."""
    tried = []
    for candidate in candidates(asked.model, asked.tokens):
        at_least = float(_compute(asked, candidate, with_mixed_again=False).sum())
        tried += [(at_least, candidate, t) for t in dict.fromkeys((None, asked.tiers))]
    best = None
    for at_least, candidate, tiers in sorted(tried, key=lambda entry: entry[0]):
        if best is not None and best[0] <= at_least:
            break
        found = _within(replace(asked, tiers=tiers), candidate, room)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    return None if best is None else best[1]


def _segments(model: ModelFootprint, plan: Plan) -> list[range]:
    return [range(a, min(a + plan.segment_layers, len(model.layers))) for a in range(0, len(model.layers), plan.segment_layers)]


def _compute(asked: Asked, candidate: Plan, *, with_mixed_again: bool) -> np.ndarray:
    """Seconds of each stretch of the step: forward of every segment, then backward."""
    seconds = layer_seconds(asked.model, asked.tokens, asked.batch, candidate.chunk_tokens, asked.rates, asked.devices)
    segments, layers = _segments(asked.model, candidate), asked.model.at(candidate.chunk_tokens)
    forward = [sum(seconds[i].forward for i in s) for s in segments]
    backward = [
        sum(seconds[i].backward + seconds[i].mixing * with_mixed_again for i in s)
        + restored_seconds(layers, seconds, candidate, s, asked.tokens)
        for s in segments
    ]  # fmt: skip
    return np.array(forward + backward)


def _within(asked: Asked, candidate: Plan, room: int) -> tuple[float, Plan] | None:
    """Seconds and plan of the choice that keeps to all budgets by the formulas, which know a little more than the problem: padding, and
    that two gradients are never held at once."""
    if asked.peak_of(candidate, only="backward of the embedding") > room:
        return None
    problem = _problem(asked, candidate, room)
    for _ in range(4):
        choice = choose(problem)
        if choice is None:
            return None
        found = _plan_of(asked, candidate, [options[i].value for options, i in zip(problem.items, choice, strict=True)])
        needed = asked.peak(found)
        if needed <= room and asked.fits_tiers(found):
            return step_seconds(problem, choice), replace(found, predicted_peak=needed)
        tighter = problem.budgets * 0.98 - max(0, needed - room) * (np.arange(len(problem.budgets)) < len(problem.budgets) // 3)
        problem = replace(problem, budgets=tighter)
    return None


def _problem(asked: Asked, candidate: Plan, room: int) -> Problem:
    """The choice of what is stored where, for one chunk and segment length, layer by layer."""
    model, tokens, batch, rates = asked.model, asked.tokens, asked.batch, asked.rates
    layers, n = model.at(candidate.chunk_tokens), tokens * batch
    chunk = min(candidate.chunk_tokens, tokens)
    segments = _segments(model, candidate)
    S = len(segments)  # moments: the loss, then the backward pass of each segment; stretches: forward of each, then backward of each
    seconds = layer_seconds(model, tokens, batch, chunk, rates, asked.devices)
    compute = _compute(asked, candidate, with_mixed_again=True)  # outputs that are stored take it off again
    restores = candidate.store_kv < 1
    host, disk = (0, 0) if asked.tiers is None else (asked.tiers.host_bytes, asked.tiers.disk.budget if asked.tiers.disk else 0)
    slower = [tier for tier, size in (("host", host), ("disk", disk)) if size]

    def option(
        value: tuple, alive: Sequence[int], tier: str, left: float, away: float, moves: Moves, saved: Saved = (), times: int = 1
    ) -> Option:
        """`left` bytes on the device and `away` in `tier` at the moments `alive`. What is away is written `times` times a step."""
        uses, work, transfer = np.zeros(3 * (S + 1) + 1), np.zeros(2 * S), np.zeros(2 * S)
        uses[np.array(alive)] += left
        if tier != "device":
            uses[np.array(alive) + (S + 1) * (1 + (tier == "disk"))] += away
            uses[-1] += away * times * (tier == "disk")
            for stretch, writes, reads in moves:
                transfer[stretch] += away * (writes / rates.write(tier) + reads / rates.read(tier))
        for stretch, amount in saved:
            work[stretch] -= amount
        return Option(value=value, uses=uses, compute=work, transfer=transfer)

    def places(what: str, layer: int, size: float, alive: Sequence[int], moves: Moves, times: int = 1) -> list[Option]:
        """All on the device, or a part of it and the rest in one of the tiers."""
        found = [option((what, layer, STAY, None), alive, "device", size, 0, ())]
        for tier in slower:
            for share in SHARES:
                split = Split(device=share, host=(1 - share) * (tier == "host"))
                found.append(option((what, layer, split, None), alive, tier, size * share, size * (1 - share), moves, times=times))
        return found

    items: list[list[Option]] = []
    every, ends = range(S + 1), layers[-1].x * n
    for j, s in enumerate(segments):
        until = [0, *range(j + 1, S + 1)]  # alive from the forward pass to this segment's backward pass, which comes after the later ones
        items.append(places("inputs", s[0], layers[s[0]].x * n, until, [(max(j - 1, 0), 1, 0), (j, 0, 1), (S + j, 0, 1 + restores)]))
        for i in s:
            f, spare, moves = layers[i], seconds[i].mixing, [(j, 1, 0), (S + j, 0, 1)]
            stored = [option(("outputs", i, STAY, 1.0), until, "device", f.output * n, 0, (), [(S + j, spare)])]
            full = f.causal and f.carry_tokens(tokens, chunk) >= tokens
            for share in FRACTIONS[1:-1] if f.causal else ():
                saved = [(S + j, spare * (1 - mixed_again(f, share, tokens, chunk)))]
                stored.append(option(("outputs", i, STAY, share), until, "device", f.output * n * share, 0, (), saved))
                for tier in slower if share * 4 % 1 == 0 else ():
                    split = Split(host=float(tier == "host"))
                    stored.append(option(("outputs", i, split, share), until, tier, 0, f.output * n * share, moves, saved))
            for o in places("outputs", i, f.output * n, until, moves)[1:] if f.causal else ():
                stored.append(replace(o, value=(*o.value[:3], 1.0), compute=stored[0].compute))
            items.append([*stored, option(("outputs", i, STAY, 0.0), [0], "device", 0, 0, ())])
            if f.causal and not full:  # all keys and values of a window lie in the store while its segment runs backward
                items.append(places("kv", i, f.carry * n, [j + 1] if restores else until, [(S + j, 1, 1)]))
            elif f.causal and not restores and f.carry:
                items.append(places("kv", i, f.carry * n, [0, *range(j + 2, S + 1)], [(j, 1, 0), (S + j, 0, 1)]))
    items.append(places("gradients", 0, ends, every, [(S + j, 1, 1) for j in range(S)], times=S + 1))

    totals = {phase.name: phase.total for phase in asked.memory(candidate)}
    moments = [totals.get("loss", 0), *(totals[f"backward of layers {s[0]} to {s[-1]}"] for s in segments)]
    counted = sum(options[0].uses[: S + 1] for options in items) - sum(o[0].uses[: S + 1] for o in items if o[0].value[0] == "outputs")
    staging = 0 if asked.tiers is None else asked.tiers.staging_bytes
    on_device = room - staging - np.array(moments) + counted
    budgets = np.array([*on_device, *[host] * (S + 1), *[disk] * (S + 1), asked.may_write], dtype=float)
    if not model.vocab_size:
        budgets[0] = inf
    return Problem(items=items, budgets=budgets, compute=compute)


def _plan_of(asked: Asked, candidate: Plan, values: Sequence[tuple]) -> Plan:
    """`candidate` with what was chosen; one value where all layers have the same."""
    layers, k = len(asked.model.layers), candidate.segment_layers
    splits = {what: [STAY] * layers for what in SPLITS}
    stored = [0.0] * layers
    for what, layer, split, share in values:
        if what == "outputs":
            stored[layer] = share
        last = layers if what == "gradients" else min(layer + k, layers) if what == "inputs" else layer + 1
        splits[what][layer:last] = [split] * (last - layer)
    offload = None
    if asked.tiers is not None and any(split != STAY for own in splits.values() for split in own):
        offload = replace(asked.tiers, **{what: _one(own) for what, own in splits.items()})
    return replace(candidate, store_outputs=_one(stored), offload=offload)


def _one(values: Sequence) -> object:
    return values[0] if len(set(values)) == 1 else tuple(values)
