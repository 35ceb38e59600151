"""What streamed steps of small models take beside their parts: an operation's launch, what is slower in a step than by itself, and what an
extent costs that is handed to the disk.

A step's time is noise of several percent, and what is looked for is what remains when most of it is taken off. So all the steps are timed
in turn, `ROUNDS` times: each meets the same changes of the machine's pace, and the mean counts, because a long step goes through them all.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf

import torch

from longtrain.apply import apply
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.offload import DiskSettings
from longtrain.plan import Offload, Plan, Split
from longtrain.planner.footprint import ModelFootprint, measure_model
from longtrain.planner.measure import once
from longtrain.planner.rates import Rates
from longtrain.planner.seconds import hidden_bytes, step_time

ROUNDS = 10

LAYERS, CHUNKS = 4, 6
"""Of each model; of the one whose tensors go to disk."""

EXTENT = 128 << 10
"""Bytes of an extent that is so small that a disk takes it in no time."""


class Steps:
    """`launches`: chunks of a few tokens, so that nothing takes long but launching. `widths`: models of growing width. `alone` and
    `with_disk`: one model with its tensors on the device, and on the disk under `directory` in extents of EXTENT. Timed when made."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rows: int, width: int, directory: str) -> None:
        model = lambda width: _model(width).to(device, dtype)
        self.launches = _Step(model(32), Plan(chunk_tokens=8), 128, device)
        self.widths = [_Step(model(w), Plan(chunk_tokens=rows), 4 * rows, device) for w in (width // 4, width // 2, width)]
        narrow = width // 4
        chunk = EXTENT // (narrow * dtype.itemsize)
        disk = DiskSettings(path=directory, budget=16 * EXTENT * LAYERS * CHUNKS)
        on_disk = Offload(inputs=Split(), outputs=Split(), kv=Split(), gradients=Split(), disk=disk)
        kept = Plan(chunk_tokens=chunk, store_outputs=1.0, store_kv=1.0)
        self.alone, self.with_disk = (_Step(model(narrow), p, CHUNKS * chunk, device) for p in (kept, replace(kept, offload=on_disk)))

        steps = [self.launches, *self.widths, self.alone, self.with_disk]
        for step in steps:
            step.call()
        for _ in range(ROUNDS):
            for step in steps:
                step.took.append(once(step.call, device))

    def launch(self, known: Rates) -> float:
        """Seconds of an operation on next to nothing: of a step, without what is `known`, by the number of its operations."""
        rest, whole = (self.launches.predicted(replace(known, launch=each)) for each in (0.0, 1.0))
        took = self.launches.seconds
        return max(took - rest, took / 4) / (whole - rest)

    def slower(self, known: Rates) -> Iterator[tuple[int, float]]:
        """By the bytes of a chunk's hidden states, how many times as long everything beside products and mixers takes in a step as it does
        by itself, again and again."""
        for step in self.widths:
            alone, whole = (step.predicted(rates) for rates in (replace(known, made=(), operations=(), moved=inf, launch=0.0), known))
            yield hidden_bytes(step.footprint, 1, step.plan.chunk_tokens), max(1.0, (step.seconds - alone) / (whole - alone))

    def handing_over(self, known: Rates) -> float:
        """Seconds that a step takes longer for each extent that goes to disk or comes back: the store's own, and those that its threads
        take from the one that computes."""
        none, one = (self.with_disk.predicted(replace(known, handing_over=each)) for each in (0.0, 1.0))
        longer = statistics.mean(there - here for there, here in zip(self.with_disk.took, self.alone.took, strict=True))
        return max(0.0, longer / (one - none))


class _Step:
    """Of `model` under `plan`, and its times."""

    def __init__(self, model: LanguageModel, plan: Plan, tokens: int, device: torch.device) -> None:
        self.plan, self.tokens = plan, tokens
        self.footprint: ModelFootprint = measure_model(model)
        apply(model, plan)
        ids_BT = torch.zeros(1, tokens, dtype=torch.int64, device=device)
        self.call: Callable[[], object] = lambda: model(ids_BT, labels=ids_BT).loss.backward()
        self.took: list[float] = []

    @property
    def seconds(self) -> float:
        return statistics.mean(self.took)

    def predicted(self, rates: Rates) -> float:
        return step_time(self.footprint, self.plan, self.tokens, 1, rates, optimizer="none").total


def _model(width: int) -> LanguageModel:
    heads = max(1, width // 64)
    return LanguageModel(
        ModelConfig(
            vocab_size=256, num_layers=LAYERS, hidden_size=width, intermediate_size=4 * width, num_heads=heads, num_kv_heads=heads
        )
    )
