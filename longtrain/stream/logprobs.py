"""Log-probabilities of tokens and entropies, streamed: norm and projection by chunks of tokens, no logits beyond a chunk.

Two numbers a token come from behind, so the backward computes each chunk again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longtrain.ops.linear_cross_entropy import check_targets
from longtrain.ops.linear_cross_entropy.logprobs import chunk_logprobs, chunk_logprobs_backward
from longtrain.span import IGNORE_INDEX, Span
from longtrain.stream.boundary import Boundary
from longtrain.stream.head import StreamedHead
from longtrain.stream.replay import delivered


def streamed_token_logprobs(
    hidden_BTE: Tensor,
    norm: nn.Module,
    head: nn.Linear,
    targets_BT: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    boundary: Boundary | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-probability of each target, entropy of its distribution), both ``[B, T]``; 0 where the target is -100.

    `norm` is any token-local module. Differentiable by hidden states, norm and head. `boundary`: what the hidden states stand in for, where
    they stream; they stay there until the backward pass. Raises ValueError for targets outside the vocabulary.
    """
    check_targets(targets_BT, head.out_features, IGNORE_INDEX)
    streamed = StreamedHead.make(hidden_BTE, norm, head, boundary, chunk_tokens)
    work = _Work(head=streamed, targets_BT=targets_BT, temperature=float(temperature), softcap=softcap)
    return _TokenLogprobs.apply(work, hidden_BTE, head.weight, head.bias, *norm.parameters())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Work:
    """What a call asks for."""

    head: StreamedHead
    targets_BT: Tensor
    temperature: float
    softcap: float | None

    def targets(self, span: Span) -> tuple[Tensor, Tensor]:
        """Targets with a stand-in where there is none, and where there is one."""
        target_C = self.targets_BT[:, span.slice()].flatten()
        valid_C = target_C != IGNORE_INDEX
        return target_C.where(valid_C, 0), valid_C


class _TokenLogprobs(torch.autograd.Function):
    """(hidden, head weight, head bias, norm parameters) -> logp ``[B, T]``, entropy ``[B, T]``."""

    @staticmethod
    def forward(ctx, work: _Work, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.work = work
        ctx.save_for_backward(*inputs)
        hidden_BTE, weight_VE, bias_V, *parameters = inputs
        head, dtype = work.head, work.head.dtype(weight_VE)
        cast_VE, hidden, parts = weight_VE.to(dtype), head.hidden(hidden_BTE), []
        for span in head.spans:
            x_BSE = hidden.get(span)
            for part in head.parts(span):
                target_C, valid_C = work.targets(part)
                with torch.autocast(hidden_BTE.device.type, enabled=False):
                    x_CE = head.normed(x_BSE[:, part.slice(span.start)], parameters, dtype).flatten(0, 1)
                    found = chunk_logprobs(x_CE, cast_VE, bias_V, target_C, work.temperature, work.softcap)
                parts.append([t.where(valid_C, 0).view(-1, len(part)) for t in found])
        return tuple(torch.cat(column, dim=1) for column in zip(*parts, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp_BT: Tensor, dentropy_BT: Tensor):
        work, inputs = ctx.work, ctx.saved_tensors

        def vjp_part(part: Span, x_CE: Tensor, cast_VE: Tensor, **wanted) -> Tensor | None:
            target_C, valid_C = work.targets(part)
            dlogp_C, dentropy_C = (d[:, part.slice()].flatten().where(valid_C, 0) for d in (dlogp_BT, dentropy_BT))
            scores = x_CE, cast_VE, inputs[2], target_C, work.temperature, work.softcap
            return chunk_logprobs_backward(dlogp_C, dentropy_C, *scores, **wanted)

        grads = work.head.vjp(inputs, ctx.needs_input_grad[1:], dlogp_BT.dtype, vjp_part)
        return None, grads[0], *map(delivered, inputs[1:], grads[1:])
