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
from longtrain.stream.boundary import Boundary
from longtrain.stream.call import Sequenced, WholeTensor
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
    boundary: Boundary | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-probability of each target, entropy of its distribution), both ``[B, T]``; 0 where the target is -100.

    `norm` is any token-local module. Differentiable by hidden states, norm and head. `boundary`: what the hidden states stand in for, where
    they stream; they stay there until the backward pass. Raises ValueError for targets outside the vocabulary.
    """
    check_targets(targets_BT, head.out_features, IGNORE_INDEX)
    norm_parameters = dict(norm.named_parameters())
    tokens = chunk_tokens or default_chunk_tokens(head.out_features, hidden_BTE.device, hidden_BTE.dtype)
    batch, length = targets_BT.shape
    work = _Work(
        norm=norm, names=tuple(norm_parameters), targets_BT=targets_BT, temperature=float(temperature), softcap=softcap, boundary=boundary,
        spans=chunk_spans(length, length or 1) if boundary is None else boundary.spans, logits_tokens=max(1, tokens // max(batch, 1)),
        surroundings=Surroundings.capture(hidden_BTE.device),
    )  # fmt: skip
    return _TokenLogprobs.apply(work, hidden_BTE, head.weight, head.bias, *norm_parameters.values())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Work:
    norm: nn.Module
    names: tuple[str, ...]
    targets_BT: Tensor
    temperature: float
    softcap: float | None
    boundary: Boundary | None
    spans: list[Span]
    """What is taken from the boundary at a time; the whole sequence when the hidden states are a tensor."""
    logits_tokens: int
    """Tokens of each row whose logits exist at one time."""
    surroundings: Surroundings

    def hidden(self, hidden_BTE: Tensor) -> Sequenced:
        return WholeTensor(hidden_BTE.shape[1], hidden_BTE) if self.boundary is None else self.boundary.value

    def parts(self, span: Span) -> list[Span]:
        """A span cut into pieces of `logits_tokens`."""
        return [Span(span.start + p.start, span.start + p.stop) for p in chunk_spans(len(span), self.logits_tokens)]

    def normed(self, hidden_CE: Tensor, parameters: Sequence[Tensor], weight_VE: Tensor) -> Tensor:
        with self.surroundings.restored():
            x_CE = functional_call(self.norm, dict(zip(self.names, parameters, strict=True)), (hidden_CE,))
        return x_CE.to(self.dtype(weight_VE))

    def dtype(self, weight_VE: Tensor) -> torch.dtype:
        """What the projection runs in: under autocast its dtype."""
        return next((dtype for kind, on, dtype in self.surroundings.autocast if kind == weight_VE.device.type and on), weight_VE.dtype)

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
        cast_VE = weight_VE.to(work.dtype(weight_VE))
        hidden, parts = work.hidden(hidden_BTE), []
        for span in work.spans:
            x_BSE = hidden.get(span)
            for part in work.parts(span):
                target_C, valid_C = work.targets(part)
                with torch.autocast(hidden_BTE.device.type, enabled=False):
                    x_CE = work.normed(x_BSE[:, part.slice(span.start)], parameters, weight_VE).flatten(0, 1)
                    found = chunk_logprobs(x_CE, cast_VE, bias_V, target_C, work.temperature, work.softcap)
                parts.append([t.where(valid_C, 0).view(-1, len(part)) for t in found])
        return tuple(torch.cat(column, dim=1) for column in zip(*parts, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp_BT: Tensor, dentropy_BT: Tensor):
        work, inputs = ctx.work, ctx.saved_tensors
        hidden_BTE, weight_VE, bias_V, *parameters = inputs
        want_hidden, want_weight, want_bias, *want_parameters = ctx.needs_input_grad[1:]
        aliases = [p.detach().requires_grad_(want) for p, want in zip(parameters, want_parameters, strict=True)]
        upstream = want_hidden or any(want_parameters)
        cast_VE = weight_VE.to(work.dtype(weight_VE))
        hidden = work.hidden(hidden_BTE)
        dhidden = WholeTensor(hidden_BTE.shape[1]) if work.boundary is None else work.boundary.grad
        dweight_VE, dbias_V = (
            torch.zeros_like(t, dtype=dlogp_BT.dtype) if want else None for t, want in ((weight_VE, want_weight), (bias_V, want_bias))
        )
        sums = GradientSums(len(parameters))
        for span in work.spans:
            x_BSE = hidden.take(span)
            dx_BSE = torch.empty_like(x_BSE) if want_hidden else None
            for part in work.parts(span):
                target_C, valid_C = work.targets(part)
                x_BCE = x_BSE[:, part.slice(span.start)].detach().requires_grad_(want_hidden)
                with torch.enable_grad():
                    normed_CE = work.normed(x_BCE, aliases, weight_VE).flatten(0, 1)
                dlogp_C, dentropy_C = (d[:, part.slice()].flatten().where(valid_C, 0) for d in (dlogp_BT, dentropy_BT))
                dx_CE = chunk_logprobs_backward(
                    dlogp_C, dentropy_C, normed_CE.detach(), cast_VE, bias_V, target_C,
                    work.temperature, work.softcap, want_dx=upstream, dweight_VE=dweight_VE, dbias_V=dbias_V,
                )  # fmt: skip
                if upstream:
                    leaves = [t for t in (x_BCE, *aliases) if t.requires_grad]
                    grads = list(torch.autograd.grad(normed_CE, leaves, dx_CE))
                    if want_hidden:
                        dx_BSE[:, part.slice(span.start)] = grads.pop(0)
                    for i in (i for i, want in enumerate(want_parameters) if want):
                        sums.add(i, grads.pop(0))
            if want_hidden:
                dhidden.put(span, dx_BSE)
        if want_hidden:
            dhidden = dhidden.tensor if work.boundary is None else work.boundary.stand_in
        return None, dhidden if want_hidden else None, *map(delivered, inputs[1:], [dweight_VE, dbias_V, *sums.totals])
