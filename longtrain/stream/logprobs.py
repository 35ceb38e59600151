"""Log-probabilities of tokens and entropies, streamed: norm and projection by chunks of tokens, no logits beyond a chunk.

Two numbers a token come from behind, so the backward computes each chunk again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from longtrain.ops.linear_cross_entropy import check_targets, default_chunk_tokens
from longtrain.ops.linear_cross_entropy.logprobs import chunk_logprobs, chunk_logprobs_backward
from longtrain.span import IGNORE_INDEX, Span, chunk_spans
from longtrain.stream.replay import GradientSums, Surroundings, delivered


def streamed_token_logprobs(
    hidden_BTE: Tensor,
    norm: nn.Module,
    head: nn.Linear,
    targets_BT: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-probability of each target, entropy of its distribution), both ``[B, T]``; 0 where the target is -100.

    `norm` is any token-local module. Differentiable by hidden states, norm and head. Raises ValueError for targets outside the vocabulary.
    """
    check_targets(targets_BT, head.out_features, IGNORE_INDEX)
    norm_parameters = dict(norm.named_parameters())
    tokens = chunk_tokens or default_chunk_tokens(head.out_features, hidden_BTE.device, hidden_BTE.dtype)
    work = _Work(
        norm, tuple(norm_parameters), targets_BT.reshape(-1), float(temperature), softcap, chunk_spans(targets_BT.numel(), tokens),
        Surroundings.capture(hidden_BTE.device),
    )
    inputs = (hidden_BTE.reshape(-1, hidden_BTE.shape[-1]), head.weight, head.bias, *norm_parameters.values())
    logp_N, entropy_N = _TokenLogprobs.apply(work, *inputs)
    return logp_N.view(targets_BT.shape), entropy_N.view(targets_BT.shape)


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    norm: nn.Module
    names: tuple[str, ...]
    target_N: Tensor
    temperature: float
    softcap: float | None
    spans: list[Span]
    surroundings: Surroundings

    def normed(self, hidden_CE: Tensor, parameters: Sequence[Tensor], weight_VE: Tensor) -> Tensor:
        with self.surroundings.restored():
            x_CE = functional_call(self.norm, dict(zip(self.names, parameters, strict=True)), (hidden_CE,))
        return x_CE.to(self.dtype(weight_VE))

    def dtype(self, weight_VE: Tensor) -> torch.dtype:
        """What the projection runs in: under autocast its dtype."""
        return next((dtype for kind, on, dtype in self.surroundings.autocast if kind == weight_VE.device.type and on), weight_VE.dtype)

    def targets(self, span: Span) -> tuple[Tensor, Tensor]:
        """Targets with a stand-in where there is none, and where there is one."""
        target_C = self.target_N[span.slice()]
        valid_C = target_C != IGNORE_INDEX
        return target_C.where(valid_C, 0), valid_C


class _TokenLogprobs(torch.autograd.Function):
    """(hidden, head weight, head bias, norm parameters) -> logp ``[N]``, entropy ``[N]``."""

    @staticmethod
    def forward(ctx, work: _Work, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.work = work
        ctx.save_for_backward(*inputs)
        hidden_NE, weight_VE, bias_V, *parameters = inputs
        cast_VE = weight_VE.to(work.dtype(weight_VE))
        parts = []
        for span in work.spans:
            target_C, valid_C = work.targets(span)
            with torch.autocast(hidden_NE.device.type, enabled=False):
                x_CE = work.normed(hidden_NE[span.slice()], parameters, weight_VE)
                part = chunk_logprobs(x_CE, cast_VE, bias_V, target_C, work.temperature, work.softcap)
            parts.append([t.where(valid_C, 0) for t in part])
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp_N: Tensor, dentropy_N: Tensor):
        work, inputs = ctx.work, ctx.saved_tensors
        hidden_NE, weight_VE, bias_V, *parameters = inputs
        want_hidden, want_weight, want_bias, *want_parameters = ctx.needs_input_grad[1:]
        aliases = [p.detach().requires_grad_(want) for p, want in zip(parameters, want_parameters, strict=True)]
        upstream = want_hidden or any(want_parameters)
        cast_VE = weight_VE.to(work.dtype(weight_VE))
        dhidden_NE = torch.empty_like(hidden_NE) if want_hidden else None
        dweight_VE, dbias_V = (
            torch.zeros_like(t, dtype=dlogp_N.dtype) if want else None for t, want in ((weight_VE, want_weight), (bias_V, want_bias))
        )
        sums = GradientSums(len(parameters))
        for span in work.spans:
            target_C, valid_C = work.targets(span)
            hidden_CE = hidden_NE[span.slice()].detach().requires_grad_(want_hidden)
            with torch.enable_grad():
                x_CE = work.normed(hidden_CE, aliases, weight_VE)
            dx_CE = chunk_logprobs_backward(
                dlogp_N[span.slice()].where(valid_C, 0), dentropy_N[span.slice()].where(valid_C, 0), x_CE.detach(), cast_VE, bias_V, target_C,
                work.temperature, work.softcap, want_dx=upstream, dweight_VE=dweight_VE, dbias_V=dbias_V,
            )
            if upstream:
                leaves = [t for t in (hidden_CE, *aliases) if t.requires_grad]
                grads = list(torch.autograd.grad(x_CE, leaves, dx_CE))
                if want_hidden:
                    dhidden_NE[span.slice()] = grads.pop(0)
                for i in (i for i, want in enumerate(want_parameters) if want):
                    sums.add(i, grads.pop(0))
        return None, dhidden_NE, *map(delivered, inputs[1:], [dweight_VE, dbias_V, *sums.totals])
