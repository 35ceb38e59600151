"""Memory reuse, planned (MEMO's bi-level problem, arXiv:2407.12117, section 4.2): where in one arena each block of a step lies.

Blocks that are alive at the same time must not overlap; the arena should be small. No arena is smaller than what is alive at the worst
moment, the liveness bound. Greedy by size (Pisarchyk and Lee 2020, arXiv:2001.03288): the largest block first, each at the lowest offset
that is free through its life. In two levels: blocks that live and die within one group (a chunk through a layer) are placed among
themselves, once for groups that are alike, and the group is one block among the others.

`cached` is what it is compared with: an allocator that takes blocks as they come, best fit, splitting and joining what is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ALIGNMENT = 512
SEGMENT = 2 << 20
"""What the caching allocator takes from the device is a multiple of this (torch, c10/cuda/CUDACachingAllocator.h: 2 MiB, as
kRoundLarge)."""


@dataclass(frozen=True, slots=True)
class Arena:
    offsets: np.ndarray
    """Of each block, in bytes."""
    size: int
    bound: int
    """Most that is alive at one time."""


def liveness(start: np.ndarray, stop: np.ndarray, nbytes: np.ndarray) -> int:
    """Most bytes alive at one time, of blocks that live in ``[start, stop)``."""
    moments = np.concatenate((start, stop))
    change = np.concatenate((nbytes, -nbytes))
    order = np.lexsort((change, moments))  # at one moment what ends goes first
    return int(np.cumsum(change[order]).max(initial=0))


def place(start: np.ndarray, stop: np.ndarray, nbytes: np.ndarray) -> Arena:
    """Greedy by size. O(n^2) in the number of blocks."""
    sizes = -(-nbytes // ALIGNMENT) * ALIGNMENT
    offsets, ends = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
    order = np.lexsort((start, -sizes))
    for rank, i in enumerate(order):
        placed = order[:rank]
        near = placed[(start[placed] < stop[i]) & (stop[placed] > start[i])]
        near = near[np.argsort(offsets[near], kind="stable")]
        free = np.concatenate(([0], np.maximum.accumulate(ends[near]))) if len(near) else np.zeros(1, np.int64)
        fits = np.flatnonzero(offsets[near] - free[:-1] >= sizes[i]) if len(near) else np.empty(0, np.int64)
        offsets[i] = free[fits[0]] if len(fits) else free[-1]
        ends[i] = offsets[i] + sizes[i]
    return Arena(offsets, int(ends.max(initial=0)), liveness(start, stop, sizes))


def place_in_two_levels(start: np.ndarray, stop: np.ndarray, nbytes: np.ndarray, groups: Sequence[tuple[int, int]]) -> Arena:
    """As `place`; `groups` are stretches ``[begin, end)`` of time, one after the other. What begins and ends in one is placed within it."""
    order = np.argsort([begin for begin, _ in groups], kind="stable")
    begins = np.array([groups[g][0] for g in order], np.int64)
    finishes = np.array([groups[g][1] for g in order], np.int64)
    of = np.searchsorted(begins, start, side="right") - 1
    inside = (of >= 0) & (stop <= finishes[np.maximum(of, 0)]) if len(begins) else np.zeros(len(start), bool)
    outer = np.flatnonzero(~inside)
    offsets, known, sizes = np.zeros(len(start), np.int64), {}, []
    members = [np.flatnonzero(inside & (of == g)) for g in range(len(begins))]
    for g, own in enumerate(members):
        key = (*(start[own] - begins[g]), *(stop[own] - begins[g]), *nbytes[own])
        if key not in known:
            known[key] = place(start[own], stop[own], nbytes[own])
        offsets[own] = known[key].offsets
        sizes.append(known[key].size)
    lives = [(start[own].min(), stop[own].max()) if len(own) else (0, 0) for own in members]
    used = [g for g, own in enumerate(members) if len(own)]
    upper = place(
        np.concatenate((start[outer], [lives[g][0] for g in used])).astype(np.int64),
        np.concatenate((stop[outer], [lives[g][1] for g in used])).astype(np.int64),
        np.concatenate((nbytes[outer], [sizes[g] for g in used])).astype(np.int64),
    )
    offsets[outer] = upper.offsets[: len(outer)]
    for g, base in zip(used, upper.offsets[len(outer) :], strict=True):
        offsets[members[g]] += base
    rounded = -(-nbytes // ALIGNMENT) * ALIGNMENT
    return Arena(offsets, upper.size, liveness(start, stop, rounded))


def cached(start: np.ndarray, stop: np.ndarray, nbytes: np.ndarray) -> int:
    """Bytes that a caching allocator has reserved in the end: blocks as they come, the smallest free piece that fits, else a new
    segment."""
    events = sorted([(int(t), 1, i) for i, t in enumerate(start)] + [(int(t), 0, i) for i, t in enumerate(stop)])
    free: list[tuple[int, int]] = []  # (offset, size), in order of offset; segments never touch
    at: dict[int, tuple[int, int]] = {}
    reserved = top = 0
    for _, begins, i in events:
        size = max(ALIGNMENT, -(-int(nbytes[i]) // ALIGNMENT) * ALIGNMENT)
        if begins:
            fits = [(n, o, k) for k, (o, n) in enumerate(free) if n >= size]
            if fits:
                n, offset, k = min(fits)
                free[k : k + 1] = [(offset + size, n - size)] if n > size else []
            else:
                segment = -(-size // SEGMENT) * SEGMENT
                offset, reserved, top = top, reserved + segment, top + segment + ALIGNMENT
                if segment > size:
                    free.append((offset + size, segment - size))
            at[i] = offset, size
        elif i in at:
            offset, size = at.pop(i)
            free = _joined(free, offset, size)
    return reserved


def _joined(free: list[tuple[int, int]], offset: int, size: int) -> list[tuple[int, int]]:
    """With a piece given back, neighbours made one."""
    merged: list[tuple[int, int]] = []
    for o, n in sorted([*free, (offset, size)]):
        if merged and merged[-1][0] + merged[-1][1] == o:
            merged[-1] = merged[-1][0], merged[-1][1] + n
        else:
            merged.append((o, n))
    return merged
