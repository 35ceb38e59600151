"""The gradients of one update: forward and backward over its sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longtrain.data.packing import Batch, check_ids
from longtrain.nn import count_targets
from longtrain.train.calls import row_loss, vocabulary
from longtrain.train.console import StepBar
from longtrain.train.optimizer import Optimizer
from longtrain.train.output import RunError


class NotFinite(RunError):
    """A loss or a gradient is not a number any more."""


def gradients(
    model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], step: int, device: torch.device, bar: StepBar
) -> tuple[float, int, Tensor]:
    """Loss, number of targets, and norm of the gradients that the optimizer now has. Raises NotFinite."""
    loss, targets = accumulate(model, optimizer, batches, step, device, bar)
    norm = optimizer.grad_norm()
    if not math.isfinite(float(norm)):
        raise not_finite("gradient norm", float(norm), step, batches)
    return loss, targets, norm


def accumulate(
    model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], step: int, device: torch.device, bar: StepBar
) -> tuple[float, int]:
    """Gradients of one update and its loss: every sequence's sum over the targets of all of them. Also their number."""
    model.train()
    targets = sum(count_targets(b.labels_BT, b.cu_seqlens) for b in batches)
    if not targets:
        raise RunError(
            f"step {step}: none of its tokens is a target ({_named(batches)} hold prompts only); raise train.tokens_per_update, or set "
            "data.packing: best_fit, which leaves such pieces out"
        )
    loss = 0.0
    for batch in batches:
        check_ids(batch, vocabulary(model))
        part = row_loss(model, batch.to(device), normalizer=targets)
        value = float(part.detach())
        if not math.isfinite(value):
            raise not_finite("loss", value, step, [batch])
        part.backward()
        optimizer.collect()
        loss += value
        bar.sequence_done()
    return loss, targets


def not_finite(what: str, value: float, step: int, batches: Sequence[Batch]) -> NotFinite:
    return NotFinite(
        f"step {step}: the {what} is {value}, on {_named(batches)}; stopped before the update, and weights saved before are untouched; "
        "lower train.lr, raise train.warmup_steps, or look at these documents"
    )


def _named(batches: Sequence[Batch]) -> str:
    names = [name for batch in batches for name in batch.documents]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
