"""Log-probabilities of the tokens of a batch under a model, without logits: what RL and preference objectives are made of.

    logp, entropy = lt.token_logprobs(model, input_ids, attention_mask=mask)     # with gradient
    with torch.no_grad():
        ref_logp, _ = lt.token_logprobs(reference, input_ids, attention_mask=mask)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longtrain.nn import LanguageModel
from longtrain.ops.linear_cross_entropy import default_chunk_tokens
from longtrain.span import IGNORE_INDEX, Layout
from longtrain.stream.logprobs import streamed_token_logprobs


def token_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    **arguments,
) -> tuple[Tensor, Tensor]:
    """For each token ``[B, T]``: its log-probability given those before it, and the entropy of the distribution it was drawn from.

    Both are 0 for the first token of a document and for padding, and stand at the token itself, as masks and labels do. Where processes
    share the sequence (``lt.apply(group=...)``), each is given all of it and gets both for all of it.

    Args:
        model: a `longtrain.nn.LanguageModel`, or a transformers causal language model under `lt.apply`. With gradients enabled the result
            is differentiable; layers and head are streamed either way.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, 0 for padding at either end.
        cu_seqlens: ``[documents + 1]``, packed documents in one row.
        temperature: logits are divided by it.
        chunk_tokens: tokens whose logits exist at one time; by default (of a transformers model) the plan's, or as many as fill 8 MiB on a
            CPU, 2 GiB on a GPU.
        arguments: passed to a transformers model.

    Raises:
        ValueError: for arguments that do not fit, and for a transformers model that forms all logits because it was not applied.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, found {temperature}")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [batch, tokens], found shape {list(input_ids.shape)}")
    if cu_seqlens is not None and (attention_mask is not None or input_ids.shape[0] != 1):
        raise ValueError(f"cu_seqlens packs documents into one row without padding: found a batch of {input_ids.shape[0]}"
                         f"{' and attention_mask' if attention_mask is not None else ''}")
    sharing = getattr(model, "longtrain_sharing", None)
    documents = Layout.make(input_ids.shape[1], cu_seqlens)
    labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
    targets = documents.next_token_targets(labels)
    if attention_mask is not None:
        targets = targets.masked_fill(attention_mask == 0, IGNORE_INDEX)
    if isinstance(model, LanguageModel):
        if attention_mask is not None:
            raise ValueError("LanguageModel takes no attention_mask: pack documents with cu_seqlens")
        seed = int(torch.randint(2**62, ())) if model.training and model.config.attention_dropout else None
        held = model.make_layout(input_ids.shape[1], cu_seqlens)
        hidden, targets = model.model(held.take(input_ids), held, seed), held.take(targets)
        found = streamed_token_logprobs(
            hidden, model.model.norm, model.lm_head, targets, temperature=temperature, chunk_tokens=chunk_tokens
        )
    else:
        if len(documents.edges) > 2:
            arguments["position_ids"] = documents.positions(input_ids.device)[None]
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **arguments).logits
        targets = targets if sharing is None else sharing.take(targets)
        found = _from_logits(logits, targets, temperature, chunk_tokens)
    if sharing is not None:
        found = map(sharing.join, found)
    logp, entropy = (nn.functional.pad(t[:, :-1], (1, 0)) for t in found)
    return logp, entropy


def _from_logits(logits: Tensor, targets: Tensor, temperature: float, chunk_tokens: int | None) -> tuple[Tensor, Tensor]:
    """From the promise of logits that a streamed model gives, or from the logits of one chunk."""
    promised = hasattr(logits, "recipe")  # longtrain.hf.head.LazyLogits
    if promised and logits.streams:
        return logits.recipe.logprobs(targets, temperature=temperature, chunk_tokens=chunk_tokens)
    if not promised and targets.numel() > default_chunk_tokens(logits.shape[-1], logits.device, logits.dtype):
        raise ValueError(
            f"the model gave out all logits, {list(logits.shape)}: call lt.apply(model, plan) first, so that they are streamed"
        )
    logp = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    valid = targets != IGNORE_INDEX
    chosen = logp.gather(-1, targets.where(valid, 0)[..., None])[..., 0]
    return chosen.where(valid, 0), -(logp.exp() * logp).sum(-1).where(valid, 0)
