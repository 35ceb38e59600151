"""The search: the fastest plan whose predicted peak fits the budget, or what to change when none does.

For every chunk and segment length, `placement.choose` decides for every layer what of its tensors is stored and where; the fastest of
those plans that keeps to every budget by the formulas of `cost.py` and `tiers.py` is the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import numpy as np
import torch
from torch import nn

from longtrain.offload import DiskSettings
from longtrain.plan import SPLITS, STAY, InfeasibleBudget, Offload, Plan, Split
from longtrain.planner.cost import ModelFootprint, measure_model, peak, step_memory
from longtrain.planner.placement import Option, Problem, choose, step_seconds
from longtrain.planner.rates import Rates, usual_rates
from longtrain.planner.seconds import layer_seconds, restored_seconds
from longtrain.planner.tiers import tier_use
from longtrain.units import format_bytes, parse_bytes

CHUNKS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SEGMENTS = (1, 2, 4, 8)
MOST_CHUNKS = 4096
"""Of a sequence: more cost more in launches than their size saves."""
SMALL_CHUNKS = 4
"""The smallest plan has one of so many smallest chunks."""
FRACTIONS = tuple(i / 20 for i in range(21))
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
    if seq_len < 1 or batch < 1 or (steps is not None and steps < 1):
        raise ValueError(f"seq_len, batch and steps must be at least 1, found {seq_len}, {batch} and {steps}")
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


@dataclass(frozen=True, slots=True)
class Asked:
    """What a plan is wanted for."""

    model: ModelFootprint
    tokens: int
    batch: int
    tiers: Offload | None
    rates: Rates
    steps: int
    devices: int = 1
    """That share every sequence: `model` and `tokens` are what one of them has."""

    @property
    def may_write(self) -> float:
        """Bytes a step."""
        disk = None if self.tiers is None else self.tiers.disk
        return inf if disk is None or disk.max_written is None else disk.max_written / self.steps

    def peak(self, plan: Plan) -> int:
        return peak(step_memory(self.model, plan, self.tokens, self.batch)).total

    def peak_of(self, plan: Plan, *, only: str) -> int:
        """Of one phase; 0 where there is none of this name."""
        return max((p.total for p in step_memory(self.model, plan, self.tokens, self.batch) if p.name == only), default=0)

    def fits_tiers(self, plan: Plan) -> bool:
        if plan.offload is None:
            return True
        use = tier_use(self.model, plan, self.tokens, self.batch)
        room = 0 if self.tiers.disk is None else self.tiers.disk.budget
        return use["host"].held <= self.tiers.host_bytes and use["disk"].held <= room and use["disk"].written <= self.may_write


def _candidates(model: ModelFootprint, tokens: int) -> list[Plan]:
    # A segment of several layers stores fewer inputs; its layers must all be causal, and be given the same.
    chunks = [c for c in CHUNKS if c < tokens and c * MOST_CHUNKS >= tokens] or [min(tokens, CHUNKS[-1])]
    alone = {chunk: not (model.alike and all(f.causal for f in model.at(chunk))) for chunk in chunks}
    segments = [k for k in SEGMENTS if k <= len(model.layers)]
    keeps = (0.0, 1.0) if any(f.carry and f.causal for f in model.layers) else (0.0,)
    return [
        Plan(chunk_tokens=c, store_outputs=0.0, store_kv=kv, segment_layers=k)
        for k in segments for c in chunks for kv in keeps if k == 1 or not alone[c]
    ]  # fmt: skip


def fastest_plan(asked: Asked, room: int) -> Plan | None:
    """Without slower tiers, and with them where they are given: their staging may cost more than they free."""
    tried = []
    for candidate in _candidates(asked.model, asked.tokens):
        at_least = float(_compute(asked, candidate, with_attention_again=False).sum())
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


def _compute(asked: Asked, candidate: Plan, *, with_attention_again: bool) -> np.ndarray:
    """Seconds of each stretch of the step: forward of every segment, then backward."""
    seconds = layer_seconds(asked.model, asked.tokens, asked.batch, candidate.chunk_tokens, asked.rates, asked.devices)
    segments = _segments(asked.model, candidate)
    forward = [sum(seconds[i].forward for i in s) for s in segments]
    backward = [
        sum(seconds[i].backward + seconds[i].attention * with_attention_again for i in s)
        + restored_seconds(seconds, candidate, s, asked.tokens)
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
    layers, k, n = model.at(candidate.chunk_tokens), candidate.segment_layers, tokens * batch
    chunk = min(candidate.chunk_tokens, tokens)
    segments = _segments(model, candidate)
    S = len(segments)  # moments: the loss, then the backward pass of each segment; stretches: forward of each, then backward of each
    seconds = layer_seconds(model, tokens, batch, chunk, rates, asked.devices)
    compute = _compute(asked, candidate, with_attention_again=True)  # outputs that are stored take it off again
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
            f, spare, moves = layers[i], seconds[i].attention, [(j, 1, 0), (S + j, 0, 1)]
            stored = [option(("outputs", i, STAY, 1.0), until, "device", f.output * n, 0, (), [(S + j, spare)])]
            full = f.causal and f.carry_tokens(tokens, chunk) >= tokens
            for share in FRACTIONS[1:-1] if f.causal else ():
                saved = [(S + j, spare * (1 - (1 - share) ** 2 if full else share))]
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

    everything = step_memory(model, candidate, tokens, batch)
    totals = {phase.name: phase.total for phase in everything}
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


def _least(asked: Asked, candidate: Plan) -> Plan:
    """`candidate` with all that the tiers hold off the device: to the host as far as it goes, the rest to the disk."""
    if asked.tiers is None:
        return candidate
    whole = replace(asked.tiers, host_bytes=1 << 62, **dict.fromkeys(SPLITS, Split(host=1.0)))
    held = max(1, tier_use(asked.model, replace(candidate, offload=whole), asked.tokens, asked.batch)["host"].held)
    possible = [f for f in reversed(FRACTIONS) if f * held <= asked.tiers.host_bytes * 1.1]
    for on_host in possible if asked.tiers.disk is not None else [1.0]:
        if on_host == 0 or asked.tiers.host_bytes:
            tried = replace(candidate, offload=replace(asked.tiers, **dict.fromkeys(SPLITS, Split(host=on_host))))
            if asked.fits_tiers(tried):
                return min((candidate, tried), key=asked.peak)
    return candidate


def smallest_plan(asked: Asked) -> tuple[Plan, int]:
    """The plan with the lowest peak: nothing stored that can be computed, everything that the tiers hold off the device."""
    candidates = [candidate for candidate in _candidates(asked.model, asked.tokens) if candidate.store_kv == 0]
    chunks = sorted({candidate.chunk_tokens for candidate in candidates})[:SMALL_CHUNKS]
    plans = [_least(asked, candidate) for candidate in candidates if candidate.chunk_tokens in chunks]
    peaks = [asked.peak(plan) for plan in plans]
    least = min(range(len(plans)), key=peaks.__getitem__)
    return plans[least], peaks[least]


def what_to_change(asked: Asked, room: int, taken: int) -> str:
    model, tokens, batch, tiers = asked.model, asked.tokens, asked.batch, asked.tiers
    smallest, needed = smallest_plan(asked)
    phase = peak(step_memory(model, smallest, tokens, batch))
    message = (
        f"no plan for {batch} x {tokens} tokens fits {format_bytes(room)}: the smallest needs {format_bytes(needed + taken)}, "
        f"{format_bytes(max(0, needed + taken - room))} more (of which {phase.largest} {format_bytes(phase.items[phase.largest])}, in the "
        f"{phase.name}); set the budget to {-(-(needed + taken) // 2**20)}MiB"
    )
    endless = replace(Offload() if tiers is None else tiers, disk=DiskSettings(path=".", budget=2**62))
    offloaded, least = smallest_plan(replace(asked, tiers=endless, steps=1))
    if least <= room - taken and offloaded.offload is not None:
        use = tier_use(model, offloaded, tokens, batch)["disk"]
        if tiers is None or tiers.disk is None:
            message += f", or give it memory.disk (of {format_bytes(use.held)}) or memory.host_budget to use"
        else:
            if use.held > tiers.disk.budget:
                message += f", or memory.disk.budget to {-(-use.held // 2**20)}MiB ({format_bytes(use.held - tiers.disk.budget)} more)"
            if use.written > asked.may_write:
                message += f", or memory.disk.max_written to {-(-use.written * asked.steps // 2**20)}MiB ({asked.steps} steps)"
    fits = longest(asked, room - taken)
    return message + (f", or the sequence length to {fits}" if fits else "; no shorter sequence fits either")


def longest(asked: Asked, room: int) -> int:
    """The longest sequence, shorter than what was asked for, that some plan fits into `room`; 0 when none does."""
    low, high = 0, asked.tokens
    while high - low > 1:
        middle = (low + high) // 2
        if smallest_plan(replace(asked, tokens=middle))[1] <= room:
            low = middle
        else:
            high = middle
    return low


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What an optimizer's state takes now."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))


def held_beside_model(model: ModelFootprint, counted: int = 0) -> int:
    """Bytes the device holds now that are not the model's parameters, nor `counted` in its footprint (gradients, optimizer state): what is
    taken before the step begins."""
    if model.device.type == "cuda":
        return max(0, torch.cuda.memory_allocated(model.device) - model.parameters - counted)
    status = Path("/proc/self/status")
    if model.device.type != "cpu" or not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return max(0, int(line.split()[1]) * 1024 - model.parameters - counted)
