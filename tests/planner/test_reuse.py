"""Planned reuse of memory: no two blocks that live together overlap, and no arena is below the liveness bound."""

from __future__ import annotations

import numpy as np
import pytest

from longtrain.planner.reuse import ALIGNMENT, SEGMENT, cached, liveness, place, place_in_two_levels


def drawn(seed: int, count: int, moments: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    start = draw.integers(0, moments - 1, count)
    return start, start + draw.integers(1, 40, count), ALIGNMENT * draw.integers(1, 3000, count)


def overlapping(start, stop, nbytes, offsets) -> int:
    """Pairs that share a byte at some moment."""
    found = 0
    for i in range(len(start)):
        together = (start < stop[i]) & (stop > start[i]) & (offsets < offsets[i] + nbytes[i]) & (offsets + nbytes > offsets[i])
        found += together.sum() - 1
    return found


@pytest.mark.parametrize("seed", range(5))
def test_blocks_that_live_together_lie_apart_and_the_bound_is_nearly_reached(seed):
    start, stop, nbytes = drawn(seed, 300)
    arena = place(start, stop, nbytes)
    assert overlapping(start, stop, nbytes, arena.offsets) == 0
    assert arena.bound == liveness(start, stop, nbytes) <= arena.size == (arena.offsets + nbytes).max()
    assert arena.size <= 1.15 * arena.bound


@pytest.mark.parametrize("seed", range(5))
def test_in_two_levels_too(seed):
    start, stop, nbytes = drawn(seed, 300)
    groups = [(begin, begin + 50) for begin in range(0, 200, 50)]
    arena = place_in_two_levels(start, stop, nbytes, groups)
    assert overlapping(start, stop, nbytes, arena.offsets) == 0
    assert arena.size >= arena.bound


def test_groups_that_are_alike_are_placed_alike():
    start, stop, nbytes = (np.array(x) for x in ([0, 1, 10, 11], [2, 3, 12, 13], [512, 1024, 512, 1024]))
    arena = place_in_two_levels(start, stop, nbytes, [(0, 10), (10, 20)])
    assert arena.offsets[0] == arena.offsets[2] and arena.offsets[1] == arena.offsets[3]
    assert arena.size == arena.bound == 1536


def test_a_block_may_begin_where_another_ends():
    assert liveness(np.array([0, 5]), np.array([5, 9]), np.array([512, 512])) == 512
    assert place(np.array([0, 5]), np.array([5, 9]), np.array([512, 512])).size == 512


def test_an_allocator_that_takes_blocks_as_they_come_leaves_holes():
    """Small, large, small, large: when the small ones go, a larger one fits into no hole."""
    unit = SEGMENT
    start, stop, nbytes = (np.array(x) for x in ([0, 1, 2, 3, 6], [5, 9, 5, 9, 9], [unit, unit, unit, unit, 2 * unit]))
    assert liveness(start, stop, nbytes) == place(start, stop, nbytes).size == 4 * unit
    assert cached(start, stop, nbytes) == 6 * unit


def test_no_blocks_need_no_arena():
    none = np.empty(0, np.int64)
    assert place(none, none, none).size == liveness(none, none, none) == cached(none, none, none) == 0
