"""The gradients of one update: forward and backward over its sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from longtrain.data.packing import Batch, check_ids
from longtrain.errors import RunError
from longtrain.nn import count_targets
from longtrain.train.calls import row_loss, vocabulary
from longtrain.train.console import StepBar
from longtrain.train.distribute import Work
from longtrain.train.optimizer import Optimizer


class NotFinite(RunError):
    """A loss or a gradient is not a number any more."""


def gradients(
    model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], step: int, device: torch.device, bar: StepBar,
    *, work: Work = Work(), seed: int = 0,
) -> tuple[float, int, Tensor]:
    """Loss, number of targets, and norm of the gradients that the optimizer now has. Raises NotFinite, on all processes."""
    loss, targets = accumulate(model, optimizer, batches, step, device, bar, work, seed)
    norm = optimizer.grad_norm()
    if not math.isfinite(float(norm)):
        raise not_finite("gradient norm", float(norm), step, batches)
    return loss, targets, norm


def accumulate(
    model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], step: int, device: torch.device, bar: StepBar,
    work: Work = Work(), seed: int = 0,
) -> tuple[float, int]:
    """Gradients of one update and its loss: every sequence's sum over the targets of all of them. Also their number.

    Of an update that several processes share, `batches` are the parts of this one. Dropout is a function of the seed, the step and the
    sequence's number in the update; that of single tokens (adapters', say) also of who of those that share the sequence holds them.
    """
    model.train()
    targets = int(work.total(sum(count_targets(b.labels_BT, b.cu_seqlens) for b in batches))[0])
    if not targets:
        raise RunError(
            f"step {step}: none of its tokens is a target ({_named(batches)} hold prompts only); raise train.tokens_per_update, or set "
            "data.packing: best_fit, which leaves such pieces out"
        )
    loss = 0.0
    for number, batch in enumerate(batches):
        check_ids(batch, vocabulary(model))
        holder = work.processes.rank % work.context
        torch.manual_seed(drawn(seed, step, number * work.data + work.place, *[holder] * (holder > 0)))
        part = row_loss(model, batch.to(device), normalizer=targets / work.data)  # gradients are averaged over the groups
        value = work.total_of_groups(float(part.detach()) / work.data)[0]
        if not math.isfinite(value):
            raise not_finite("loss", value, step, [batch])
        part.backward()
        optimizer.collect()
        loss += value
        bar.sequence_done()
        work.processes.moved()
    return loss, targets


def drawn(*numbers: int) -> int:
    """A seed made of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def not_finite(what: str, value: float, step: int, batches: Sequence[Batch]) -> NotFinite:
    return NotFinite(
        f"step {step}: the {what} is {value}, on {_named(batches)}; stopped before the update, and weights saved before are untouched; "
        "lower train.lr, raise train.warmup_steps, or look at these documents"
    )


def _named(batches: Sequence[Batch]) -> str:
    names = [name for batch in batches for name in batch.documents]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
