"""The search: the fastest plan whose predicted peak fits the budget, or what to change when none does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from longtrain.plan import InfeasibleBudget, Plan
from longtrain.planner.cost import ModelFootprint, measure_model, peak, relative_time, step_memory
from longtrain.units import format_bytes, parse_bytes

CHUNKS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SEGMENTS = (1, 2, 4, 8)
FRACTIONS = tuple(i / 20 for i in range(21))


def plan(
    model: nn.Module, seq_len: int, budget: str | int, *, batch: int = 1, optimizer_bytes_per_parameter: int = 8
) -> Plan:
    """The fastest plan for steps of `batch` x `seq_len` tokens within `budget`.

        plan = lt.plan(model, seq_len=131_072, budget="72GiB")

    budget: bytes, or text such as "72GiB" or "80GB". On a GPU, device memory; on a CPU, resident memory of this process, of which
    what it holds now beside the model (imports, data) counts as taken. `optimizer_bytes_per_parameter`: AdamW's two float32 moments.

    Returns a `Plan` with `predicted_peak`. Raises InfeasibleBudget naming the cheapest changes that fit, ValueError for a model
    without streamable layers or a budget that cannot be read.
    """
    if seq_len < 1 or batch < 1:
        raise ValueError(f"seq_len and batch must be at least 1, found {seq_len} and {batch}")
    room = parse_bytes(budget)
    footprint = measure_model(model, optimizer_bytes_per_parameter)
    taken = held_beside_model(footprint)
    found = _fastest(footprint, seq_len, batch, room - taken)
    if found is not None:
        return replace(found, predicted_peak=found.predicted_peak + taken)
    raise InfeasibleBudget(_what_to_change(footprint, seq_len, batch, room, taken))


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


def _fastest(model: ModelFootprint, seq_len: int, batch: int, room: int) -> Plan | None:
    best = None
    for candidate in _candidates(model, seq_len):
        needed = peak(step_memory(model, candidate, seq_len, batch)).total
        if needed > room:
            continue
        key = (relative_time(candidate, len(model.layers), seq_len), needed)
        if best is None or key < best[0]:
            best = key, replace(candidate, predicted_peak=needed)
    return None if best is None else best[1]


def _smallest(model: ModelFootprint, seq_len: int, batch: int) -> tuple[Plan, int]:
    plans = [(peak(step_memory(model, p, seq_len, batch)).total, i, p) for i, p in enumerate(_candidates(model, seq_len))]
    needed, _, smallest = min(plans)
    return smallest, needed


def _what_to_change(model: ModelFootprint, seq_len: int, batch: int, room: int, taken: int) -> str:
    smallest, needed = _smallest(model, seq_len, batch)
    phase = peak(step_memory(model, smallest, seq_len, batch))
    message = (
        f"no plan for {batch} x {seq_len} tokens fits {format_bytes(room)}: the smallest needs {format_bytes(needed + taken)} "
        f"(of which {phase.largest} {format_bytes(phase.items[phase.largest])}, in the {phase.name}); "
        f"set the budget to {-(-(needed + taken) // 2**20)}MiB"
    )
    fits = longest(model, batch, room - taken, below=seq_len)
    return message + (f", or the sequence length to {fits}" if fits else "; no shorter sequence fits either")


def longest(model: ModelFootprint, batch: int, room: int, below: int) -> int:
    """The longest sequence under `below` tokens that some plan fits into `room`; 0 when none does."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        if _smallest(model, middle, batch)[1] <= room:
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
