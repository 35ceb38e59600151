"""Which of several options each stored tensor takes: the fastest choice under budgets for device memory, each tier, and bytes written.

A choice costs, in each stretch of the step (a segment's forward or backward pass), the longer of its compute and its transfers, which
overlap. The greedy search starts from everything on the device and takes, while something is over its budget, the option with the most
bytes freed, times the moments they would have been alive at, for a second of exposed time (MEMO's split, arXiv:2407.12117, generalised);
then it takes back what turned out not to be needed. `tests/planner/exact.py` states the same problem as an integer program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NOTHING = 1e-9
"""Seconds that are none."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Option:
    """One way to keep one tensor."""

    value: Any
    """What it stands for, to who made it."""

    uses: np.ndarray
    """Of each budget, in bytes."""

    compute: np.ndarray
    """Seconds that it adds to each stretch's compute."""

    transfer: np.ndarray
    """Seconds that it adds to each stretch's transfers."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Problem:
    items: Sequence[Sequence[Option]]
    """Of each tensor its options; the first is the one that moves nothing."""

    budgets: np.ndarray
    """Bytes: device memory at each moment of the step, host and disk at each, bytes written to the disk."""

    compute: np.ndarray
    """Seconds of each stretch whatever is chosen."""


def step_seconds(problem: Problem, choice: Sequence[int]) -> float:
    """Of the step with option ``choice[i]`` for tensor i."""
    chosen = [options[i] for options, i in zip(problem.items, choice, strict=True)]
    compute = problem.compute + sum((o.compute for o in chosen), np.zeros_like(problem.compute))
    return float(np.maximum(compute, sum((o.transfer for o in chosen), np.zeros_like(problem.compute))).sum())


def choose(problem: Problem) -> list[int] | None:
    """An option for each tensor that keeps to every budget, in as little time as a greedy search finds; None where it finds none."""
    rows = _Rows(problem)
    found = [choice for start in (rows.on_device, rows.smallest) if (choice := rows.search(start())) is not None]
    return min(found, key=lambda choice: step_seconds(problem, choice), default=None)


class _Rows:
    """All options under each other, so that one change of a choice is judged beside all others at once."""

    def __init__(self, problem: Problem) -> None:
        self._problem, options = problem, [(i, j, o) for i, own in enumerate(problem.items) for j, o in enumerate(own)]
        self._item, self._option = (np.array([o[k] for o in options]) for k in (0, 1))
        self._uses, self._compute, self._transfer = (np.array([getattr(o[2], k) for o in options]) for k in ("uses", "compute", "transfer"))
        self._first = np.searchsorted(self._item, np.arange(len(problem.items)))
        self._scale = np.where(np.isfinite(problem.budgets), np.maximum(problem.budgets, 1.0), 1.0)

    def on_device(self) -> np.ndarray:
        return self._first.copy()

    def smallest(self) -> np.ndarray:
        """The options that use least of all budgets together."""
        weight = (self._uses / self._scale).sum(1)
        return np.array([rows[np.argmin(weight[rows])] for rows in np.split(np.arange(len(self._item)), self._first[1:])])

    def search(self, chosen: np.ndarray) -> list[int] | None:
        """From `chosen`, rows by item, to what keeps to the budgets, and from there to what is faster."""
        while True:
            over, seconds = self._after(chosen)
            now_over, now = over[chosen[0]], seconds[chosen[0]]
            freed = now_over - over
            if now_over > 0:
                if freed.max() <= 0:
                    return None
                slower = seconds - now
                gain = np.where(freed > 0, freed / np.maximum(slower, NOTHING), 0.0)
                best = int(np.argmax(gain))
            else:
                faster = np.where(over <= 0, now - seconds, 0.0)
                best = int(np.argmax(faster))
                if faster[best] <= NOTHING:
                    return self._option[chosen].tolist()
            chosen[self._item[best]] = best

    def _after(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each row, were it chosen: by how much budgets are exceeded, as shares summed up, and the step's seconds."""
        swapped = chosen[self._item]
        uses, compute, transfer = (
            all_[chosen].sum(0) - all_[swapped] + all_ for all_ in (self._uses, self._compute, self._transfer)
        )
        over = np.maximum(uses - self._problem.budgets, 0.0) / self._scale
        over[uses - self._problem.budgets < 0.5] = 0.0  # rounding of sums
        return over.sum(1), np.maximum(self._problem.compute + compute, transfer).sum(1)
