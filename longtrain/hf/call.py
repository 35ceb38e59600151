"""One packed row through a causal language model of transformers, streamed or not: its loss, or its logits at some positions.

Documents are kept apart by positions that begin anew, which transformers reads as document boundaries where no mask is given. The loss is
made here, of the promise of logits that a streamed head gives (`head.py`) or of logits: the next token of the same document is the
target, and the normaliser is the caller's, in every family.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtrain.span import IGNORE_INDEX, Layout


def packed_loss(
    model: nn.Module,
    input_ids_BT: Tensor,
    labels_BT: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    normalizer: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As `longtrain.nn.LanguageModel` computes it: a scalar, or ``[1, T]`` for reduction "none"; -100 is ignored, `normalizer` divides
    the sum of a scalar in place of the number of targets."""
    documents = Layout.make(input_ids_BT.shape[1], cu_seqlens)
    targets_BT = documents.next_token_targets(labels_BT)
    logits = model(input_ids=input_ids_BT, position_ids=positions(documents, labels_BT), use_cache=False).logits
    recipe = getattr(logits, "recipe", None)
    if recipe is not None and recipe.streams:
        return recipe.loss(targets_BT, normalizer=normalizer, reduction=reduction)
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss_BT = F.cross_entropy(logits.to(wide).flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    if reduction == "none":
        return loss_BT.view_as(targets_BT)
    return loss_BT.sum() / ((targets_BT != IGNORE_INDEX).sum() if normalizer is None else normalizer)


def logits_at(model: nn.Module, input_ids_BT: Tensor, documents: Layout, at_N: Tensor) -> Tensor:
    """Logits ``[N, V]`` of the positions `at_N` of one row; no others are formed by a streamed model."""
    logits = model(input_ids=input_ids_BT, position_ids=documents.positions(input_ids_BT.device)[None], use_cache=False).logits
    if (recipe := getattr(logits, "recipe", None)) is None:
        return logits[0, at_N]
    logits_NV = recipe.project(recipe.hidden_BTE[0, at_N])
    for step in logits.steps:
        logits_NV = step(logits_NV)
    return logits_NV


def positions(documents: Layout, labels_BT: Tensor) -> Tensor:
    """``[1, T]``: every token's position in its document. A last document without labels is padding, and is cut into pieces no longer
    than the longest of the others, so that no position is larger than the data's."""
    position_T = documents.positions(labels_BT.device)
    *before, last = documents.edges[:-1]
    if before and bool((labels_BT[0, last:] == IGNORE_INDEX).all()):
        longest = max(b - a for a, b in zip(documents.edges, documents.edges[1:-1], strict=False))
        position_T = torch.cat([position_T[:last], position_T[last:] % longest])
    return position_T[None]
