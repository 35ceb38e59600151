"""The plan that needs least memory, and what would have to change where even that does not fit."""

from __future__ import annotations

from dataclasses import replace

from longtrain.offload import DiskSettings
from longtrain.plan import SPLITS, Offload, Plan, Split
from longtrain.planner.asked import FRACTIONS, Asked, candidates
from longtrain.planner.cost import peak
from longtrain.planner.tiers import tier_use
from longtrain.units import format_bytes

SMALL_CHUNKS = 4
"""The smallest plan has one of so many smallest chunks."""

SPARE = 8 * 2**20
"""What a process holds beside the model differs by some MiB from one run of the same program to the next, where that is resident memory: a
change that is named must do then too."""


def smallest_plan(asked: Asked) -> tuple[Plan, int]:
    """The plan with the lowest peak: nothing stored that can be computed, everything that the tiers hold off the device."""
    possible = [candidate for candidate in candidates(asked.model, asked.tokens) if candidate.store_kv == 0]
    chunks = sorted({candidate.chunk_tokens for candidate in possible})[:SMALL_CHUNKS]
    plans = [_least(asked, candidate) for candidate in possible if candidate.chunk_tokens in chunks]
    peaks = [asked.peak(plan) for plan in plans]
    least = min(range(len(plans)), key=peaks.__getitem__)
    return plans[least], peaks[least]


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


def what_to_change(asked: Asked, room: int, taken: int) -> str:
    """The cheapest changes that fit `room` and the `taken` bytes beside it."""
    model, tokens, batch, tiers = asked.model, asked.tokens, asked.batch, asked.tiers
    smallest, needed = smallest_plan(asked)
    spare = SPARE if taken and model.device.type == "cpu" else 0
    phase = peak(asked.memory(smallest))
    message = (
        f"no plan for {batch} x {tokens} tokens fits {format_bytes(room)}: the smallest needs {format_bytes(needed + taken)}, "
        f"{format_bytes(max(0, needed + taken - room))} more (of which {phase.largest} {format_bytes(phase.items[phase.largest])}, in the "
        f"{phase.name}); set the budget to {-(-(needed + taken + spare) // 2**20)}MiB"
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
    fits = longest(asked, room - taken - spare)
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
