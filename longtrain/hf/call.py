"""One packed row through a causal language model of transformers, streamed or not: its loss, or its logits at some positions.

Documents are kept apart by positions that begin anew, which transformers reads as document boundaries where no mask is given. The loss is
made here, of the promise of logits that a streamed head gives (`head.py`) or of logits: the next token of the same document is the
target, and the normaliser is the caller's, in every family. Processes that share a sequence (`share.py`) are each given all of it, or of
ids and labels the part that they need.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtrain.hf.head import LazyLogits
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
    the sum of a scalar in place of the number of targets. Of a sequence that processes share, a scalar is that of all of it, and ``[1, T]``
    is of the tokens that this process holds."""
    documents, sharing = Layout.make(input_ids_BT.shape[1], cu_seqlens), getattr(model, "longtrain_sharing", None)
    targets_BT = documents.next_token_targets(labels_BT)
    padded = documents.edges[-2] > 0 and not _any_label(labels_BT[:, documents.edges[-2] :], sharing)
    logits = _logits(model, input_ids_BT, positions(documents, padded, labels_BT.device))
    if sharing is not None:
        targets_BT = sharing.take(targets_BT)
    if normalizer is None and reduction == "mean":
        normalizer = (targets_BT != IGNORE_INDEX).sum()
        normalizer = normalizer if sharing is None else sharing.mesh.all.sum(normalizer)
    if isinstance(logits, LazyLogits) and logits.streams:
        loss = logits.recipe.loss(targets_BT, normalizer=normalizer, reduction=reduction)
    else:
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = F.cross_entropy(logits.to(wide).flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        loss = loss.view_as(targets_BT) if reduction == "none" else loss.sum() / normalizer
    return loss if sharing is None or reduction == "none" else sharing.total(loss)


def _logits(model: nn.Module, input_ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """Of the model in which peft has put adapters, where `model` is peft's: older versions of it call the forward past its hooks."""
    called = model.get_base_model() if hasattr(model, "get_base_model") else model
    return called(input_ids=input_ids_BT, position_ids=positions_BT, use_cache=False).logits


def _any_label(labels_BT: Tensor, sharing) -> bool:
    """Whether there is a target among them; of labels that processes have parts of, in any of these."""
    found = (labels_BT != IGNORE_INDEX).any()
    return bool(found if sharing is None else sharing.mesh.all.greatest(found.long()))


def logits_at(model: nn.Module, input_ids_BT: Tensor, documents: Layout, at_N: Tensor) -> Tensor:
    """Logits ``[N, V]`` of the positions `at_N` of one row; no others are formed by a streamed model. Zeros where another process has
    them."""
    logits = _logits(model, input_ids_BT, documents.positions(input_ids_BT.device)[None])
    sharing = getattr(model, "longtrain_sharing", None)
    place_N = at_N if sharing is None else sharing.places(at_N)
    if not isinstance(logits, LazyLogits) or logits.edited:
        logits_NV = logits[0, place_N]
    else:
        logits_NV = logits.recipe.project(logits.recipe.hidden_BTE[0, place_N])
        for step in logits.steps:
            logits_NV = step(logits_NV)
    return logits_NV.masked_fill(place_N[:, None] < 0, 0)


def positions(documents: Layout, padded: bool, device: torch.device | str = "cpu") -> Tensor:
    """``[1, T]``: every token's position in its document. Where the last one is padding (it has no label) it is cut into pieces no longer
    than the longest of the others, so that no position is larger than the data's."""
    position_T, last = documents.positions(device), documents.edges[-2]
    if padded:
        longest = max(b - a for a, b in zip(documents.edges, documents.edges[1:-1], strict=False))
        position_T = torch.cat([position_T[:last], position_T[last:] % longest])
    return position_T[None]
