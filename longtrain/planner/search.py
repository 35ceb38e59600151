"""The search: the fastest plan whose predicted peak fits the budget, or what to change when none does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from longtrain.offload import DiskSettings
from longtrain.plan import SPLITS, InfeasibleBudget, Offload, Plan, Split
from longtrain.planner.cost import ModelFootprint, measure_model, peak, relative_time, step_memory
from longtrain.planner.tiers import tier_use
from longtrain.units import format_bytes, parse_bytes

CHUNKS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SEGMENTS = (1, 2, 4, 8)
FRACTIONS = tuple(i / 20 for i in range(21))
OFFLOAD_ORDER = ("inputs", "outputs", "kv", "gradients")
"""Longest alive first: a byte of the first layer's input that leaves is gone for nearly the whole step, one of a gradient for two layers."""


def plan(
    model: nn.Module,
    seq_len: int,
    budget: str | int,
    *,
    batch: int = 1,
    optimizer_bytes_per_parameter: int = 8,
    tiers: Offload | None = None,
) -> Plan:
    """The fastest plan for steps of `batch` x `seq_len` tokens within `budget`.

        plan = lt.plan(model, seq_len=131_072, budget="72GiB")

    budget: bytes, or text such as "72GiB" or "80GB". On a GPU, device memory; on a CPU, resident memory of this process, of which
    what it holds now beside the model (imports, data) counts as taken. `optimizer_bytes_per_parameter`: AdamW's two float32 moments.
    `tiers`: slower tiers that may be used (`host_bytes`, `disk`, `staging_bytes` of an `lt.Offload`; its splits are chosen here): as
    little as fits the budget leaves the device, to the host before the disk.

    Returns a `Plan` with `predicted_peak`. Raises InfeasibleBudget naming the cheapest changes that fit, ValueError for a model
    without streamable layers or a budget that cannot be read.
    """
    if seq_len < 1 or batch < 1:
        raise ValueError(f"seq_len and batch must be at least 1, found {seq_len} and {batch}")
    room = parse_bytes(budget)
    footprint = measure_model(model, optimizer_bytes_per_parameter)
    taken = held_beside_model(footprint)
    found = _fastest(footprint, seq_len, batch, room - taken, tiers)
    if found is not None:
        return replace(found, predicted_peak=found.predicted_peak + taken)
    raise InfeasibleBudget(_what_to_change(footprint, seq_len, batch, room, taken, tiers))


def _candidates(model: ModelFootprint, seq_len: int) -> list[Plan]:
    # A segment of several layers stores fewer inputs; its layers must all be causal.
    segments = [k for k in SEGMENTS if k <= len(model.layers)] if all(f.causal for f in model.layers) else [1]
    chunks = [c for c in CHUNKS if c < seq_len] or [seq_len]
    return [
        Plan(chunk_tokens=chunk, store_outputs=fraction, segment_layers=k)
        for k in segments
        for chunk in chunks
        for fraction in FRACTIONS
    ]


def _fastest(model: ModelFootprint, seq_len: int, batch: int, room: int, tiers: Offload | None) -> Plan | None:
    best = None
    for candidate in _candidates(model, seq_len):
        fitting = _offloaded_to_fit(model, candidate, seq_len, batch, room, tiers)
        if fitting is None:
            continue
        needed = peak(step_memory(model, fitting, seq_len, batch)).total
        key = (relative_time(fitting, len(model.layers), seq_len), _moved(model, fitting, seq_len, batch), needed)
        if best is None or key < best[0]:
            best = key, replace(fitting, predicted_peak=needed)
    return None if best is None else best[1]


def _offloaded_to_fit(model: ModelFootprint, plan: Plan, seq_len: int, batch: int, room: int, tiers: Offload | None) -> Plan | None:
    """`plan` with the least offload whose peak fits `room`, or None.

    Tensor after tensor in the order of `OFFLOAD_ORDER` leaves the device, its first tokens first, until the peak fits; what leaves goes to
    the host while there is room, then to the disk.
    """
    if peak(step_memory(model, plan, seq_len, batch)).total <= room:
        return plan
    if tiers is None:
        return None
    stay = dict.fromkeys(SPLITS, 1.0)

    def attempt() -> Plan | None:
        return _split(model, plan, seq_len, batch, stay, tiers)

    for what in OFFLOAD_ORDER:
        for share in reversed(FRACTIONS[:-1]):
            stay[what] = share
            tried = attempt()
            if tried is None:
                break
            if peak(step_memory(model, tried, seq_len, batch)).total <= room:
                return tried
    return None


def _split(
    model: ModelFootprint, plan: Plan, seq_len: int, batch: int, stay: dict[str, float], tiers: Offload
) -> Plan | None:
    """`plan` with the `stay` shares on the device and the rest on the host and on disk, or None when these cannot hold it."""
    for on_host in reversed(FRACTIONS):  # of what leaves, the share that goes to the host
        if on_host < 1 and tiers.disk is None or on_host > 0 and not tiers.host_bytes:
            continue
        splits = {what: Split(device=share, host=(1 - share) * on_host) for what, share in stay.items()}
        tried = replace(plan, offload=replace(tiers, **splits))
        use = tier_use(model, tried, seq_len, batch)
        disk = tiers.disk
        fits_disk = disk is None or use["disk"].held <= disk.budget and (disk.max_written is None or use["disk"].written <= disk.max_written)
        if use["host"].held <= tiers.host_bytes and fits_disk:
            return tried
    return None


def _moved(model: ModelFootprint, plan: Plan, seq_len: int, batch: int) -> int:
    """Bytes that a step writes to slower tiers."""
    return sum(use.written for use in tier_use(model, plan, seq_len, batch).values())


def _smallest(model: ModelFootprint, seq_len: int, batch: int, tiers: Offload | None) -> tuple[Plan, int]:
    """The plan with the lowest peak: everything that the tiers hold leaves."""
    plans = []
    for i, candidate in enumerate(_candidates(model, seq_len)):
        tried = None if tiers is None else _split(model, candidate, seq_len, batch, dict.fromkeys(SPLITS, 0.0), tiers)
        plans += [(peak(step_memory(model, p, seq_len, batch)).total, i, p) for p in (candidate, tried) if p is not None]
    needed, _, smallest = min(plans, key=lambda entry: entry[:2])
    return smallest, needed


def _what_to_change(model: ModelFootprint, seq_len: int, batch: int, room: int, taken: int, tiers: Offload | None) -> str:
    smallest, needed = _smallest(model, seq_len, batch, tiers)
    phase = peak(step_memory(model, smallest, seq_len, batch))
    message = (
        f"no plan for {batch} x {seq_len} tokens fits {format_bytes(room)}: the smallest needs {format_bytes(needed + taken)} "
        f"(of which {phase.largest} {format_bytes(phase.items[phase.largest])}, in the {phase.name}); "
        f"set the budget to {-(-(needed + taken) // 2**20)}MiB"
    )
    if tiers is None:
        everything = Offload(disk=DiskSettings(path=".", budget=2**62))
        _, offloaded = _smallest(model, seq_len, batch, everything)
        if offloaded <= room - taken:
            message += ", or give it memory.disk or memory.host_budget to use"
    fits = longest(model, batch, room - taken, seq_len, tiers)
    return message + (f", or the sequence length to {fits}" if fits else "; no shorter sequence fits either")


def longest(model: ModelFootprint, batch: int, room: int, below: int, tiers: Offload | None = None) -> int:
    """The longest sequence under `below` tokens that some plan fits into `room`; 0 when none does."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        if _smallest(model, middle, batch, tiers)[1] <= room:
            low = middle
        else:
            high = middle
    return low


def held_beside_model(model: ModelFootprint) -> int:
    """Bytes the device holds now that are not the model's parameters; what counts as taken before the step begins."""
    if model.device.type == "cuda":
        return max(0, torch.cuda.memory_allocated(model.device) - model.parameters)
    status = Path("/proc/self/status")
    if model.device.type != "cpu" or not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return max(0, int(line.split()[1]) * 1024 - model.parameters)
