"""Where a program was between two marks of `watch.py`: phase, visible part of the model, innermost module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longtrain.memory.watch import BACKWARD, BACKWARD_END, ENTER, LEAVE, OPTIMIZER, OPTIMIZER_END, REACH, STEP, Watch

FOREVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Context:
    """A stretch between two marks: from event `start` on. `leaves`: the event at which its innermost module is left."""

    start: int
    nanoseconds: int
    phase: str
    band: int
    module: int
    leaves: int = FOREVER


def make_contexts(watch: Watch) -> list[Context]:
    """From marks to stretches: phase, visible part and innermost module of each."""
    found: list[list] = [[-1, 0, "outside", 0, 0, FOREVER]]
    stack: list[list] = []  # [module, contexts that it is the innermost of]
    phase, reached = "outside", 0
    for kind, module, nanoseconds, event in np.frombuffer(watch.marks, np.int64).reshape(-1, 4).tolist():
        if kind == ENTER:
            stack.append([module, []])
            phase = "forward" if phase == "outside" else phase
        elif kind == LEAVE:
            while stack:
                left, own = stack.pop()
                for i in own:
                    found[i][5] = event
                if left == module:
                    break
        elif kind == STEP:
            phase, stack = "forward", []
        elif kind == BACKWARD:
            phase, reached = "backward", 0
        elif kind == REACH:
            reached = module
        elif kind == BACKWARD_END:
            phase, stack, reached = "outside", [], 0
        elif kind == OPTIMIZER:
            phase = "optimizer"
        elif kind == OPTIMIZER_END:
            phase = "outside"
        band = next((m for m, _ in stack if m in watch.bands), reached if phase == "backward" else 0)
        if phase == "backward":
            reached = band or reached
        found.append([event, nanoseconds, phase, band, stack[-1][0] if stack else 0, FOREVER])
        if stack:
            stack[-1][1].append(len(found) - 1)
    return [Context(*row) for row in found]


def next_backward(contexts: Sequence[Context]) -> list[int]:
    """For each context the event at which the next backward pass begins; FOREVER where none does."""
    begins, following = [], FOREVER
    for context in reversed(contexts):
        following = context.start if context.phase == "backward" else following
        begins.append(following)
    return begins[::-1]
