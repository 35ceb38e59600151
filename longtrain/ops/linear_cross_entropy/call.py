"""What a call of the op is, apart from its tensors: the options that define the loss, and the checks every backend relies on.

Axes: N tokens (all leading axes of `input` flattened), E model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """What one token's loss is; the same for all tokens of a call."""

    ignore_index: int = -100
    """Target value of a token that has no loss and passes no gradient."""
    softcap: float | None = None
    """Logits become `softcap * tanh(logits / softcap)` (Gemma 2, arXiv:2408.00118, section 2)."""
    z_loss: float = 0.0
    """Weight of `lse^2` in each token's loss (PaLM, arXiv:2204.02311, section 5)."""
    label_smoothing: float = 0.0
    """Share of each target spread evenly over the vocabulary, in [0, 1] (arXiv:1512.00567, section 7)."""

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"linear_cross_entropy: softcap must be None or positive, not {self.softcap!r}")
        if not 0 <= self.z_loss < float("inf"):
            raise ValueError(f"linear_cross_entropy: z_loss must be 0 or a positive number, not {self.z_loss!r}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"linear_cross_entropy: label_smoothing must lie in [0, 1], not {self.label_smoothing!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One flattened call, as the backends and their `refuse` functions see it."""

    input_NE: Tensor
    weight_VE: Tensor
    target_N: Tensor
    bias_V: Tensor | None
    token_weights_N: Tensor | None
    """Already in the wide dtype."""
    scale: Tensor | None
    """0-d, wide: what the summed loss is multiplied with; None for reduction "none"."""
    options: LossOptions
    chunk_tokens: int | None


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype losses and weight gradients are accumulated in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def check_shapes(input: Tensor, weight_VE: Tensor, target: Tensor, bias_V: Tensor | None) -> None:
    """Raise ValueError for tensors that do not belong together."""
    name = "linear_cross_entropy"
    if input.dim() < 1 or weight_VE.dim() != 2 or input.shape[-1] != weight_VE.shape[1]:
        raise ValueError(f"{name}: input [..., E] and weight [V, E] do not fit: {list(input.shape)} and {list(weight_VE.shape)}")
    if target.shape != input.shape[:-1]:
        raise ValueError(f"{name}: target must have the shape of input without its last axis, {list(input.shape[:-1])}, "
                         f"not {list(target.shape)}")
    if input.dtype != weight_VE.dtype or not input.dtype.is_floating_point:
        raise ValueError(f"{name}: input and weight must share one floating dtype, not {input.dtype} and {weight_VE.dtype}; "
                         "convert one of them, or run under torch.autocast")
    if bias_V is not None and bias_V.shape != weight_VE.shape[:1]:
        raise ValueError(f"{name}: bias must have shape [V] = {list(weight_VE.shape[:1])}, not {list(bias_V.shape)}")


def check_settings(target: Tensor, token_weights: Tensor | None, reduction: str, normalizer: float | Tensor | None) -> None:
    """Raise ValueError for what makes one number of the losses, where it does not fit or would have no effect."""
    name = "linear_cross_entropy"
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"{name}: normalizer= divides a mean; with reduction={reduction!r} it would have no effect")
    if token_weights is not None:
        if token_weights.shape != target.shape:
            raise ValueError(f"{name}: token_weights must have target's shape {list(target.shape)}, not {list(token_weights.shape)}")
        if token_weights.requires_grad:
            raise ValueError(f"{name}: token_weights are data and get no gradient; detach them, or take reduction='none' and "
                             "multiply its result with them")


def check_targets(target: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise one ValueError that names the first target outside the vocabulary, or another dtype than int64.

    One reduction over N integers; on a GPU it waits for the device once. Skipped while a graph is captured or compiled,
    where nothing can be read back.
    """
    if target.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: target must be int64, not {target.dtype}; class probabilities are not taken")
    if torch.compiler.is_compiling() or target.numel() == 0:
        return
    if target.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    outside = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    if not outside.any():
        return
    position = tuple(outside.nonzero()[0].tolist())
    where = position[0] if len(position) == 1 else position
    raise ValueError(
        f"linear_cross_entropy: target at position {where} is {target[position].item()}, outside the vocabulary of {vocab} "
        f"(and not ignore_index={ignore_index}); {int(outside.sum())} such targets in all. "
        "Check the tokenizer against the model's vocabulary.")
