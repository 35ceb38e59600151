"""The language-model head, streamed: norm, projection and loss by chunks of tokens, no logits beyond a chunk.

For a summed or mean loss the gradient is linear in the one number that comes from behind, so it is made in the forward pass while
the chunk's logits are there, and scaled in the backward. Per-token losses have many numbers coming from behind: their backward
computes each chunk again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from longtrain.ops.linear_cross_entropy import (
    LossOptions,
    check_targets,
    chunk_loss_and_grad,
    default_chunk_tokens,
    linear_cross_entropy,
    loss_scale,
    workspace,
)
from longtrain.span import Span, chunk_spans
from longtrain.stream.replay import GradientSums, Surroundings, delivered


def streamed_token_loss(
    hidden_BTE: Tensor,
    norm: nn.Module,
    head: nn.Linear,
    targets_BT: Tensor,
    *,
    normalizer: float | Tensor | None = None,
    token_weights_BT: Tensor | None = None,
    reduction: str = "mean",
    options: LossOptions = LossOptions(),
    chunk_tokens: int | None = None,
) -> Tensor:
    """As `longtrain.nn.TokenLoss.forward`, never holding more than `chunk_tokens` tokens' logits.

    `norm` is any token-local module; its parameters and the head's receive their gradients once. Raises ValueError for targets outside
    the vocabulary.
    """
    check_targets(targets_BT, head.out_features, options.ignore_index)
    norm_parameters = dict(norm.named_parameters())
    wide = torch.promote_types(hidden_BTE.dtype, torch.float32)
    work = _Head(
        norm=norm,
        names=tuple(norm_parameters),
        target_N=targets_BT.reshape(-1),
        weight_N=None if token_weights_BT is None else token_weights_BT.reshape(-1).to(wide),
        options=options,
        spans=chunk_spans(
            targets_BT.numel(), chunk_tokens or default_chunk_tokens(head.out_features, hidden_BTE.device, hidden_BTE.dtype)
        ),
        surroundings=Surroundings.capture(hidden_BTE.device),
    )
    inputs = (hidden_BTE.reshape(-1, hidden_BTE.shape[-1]), head.weight, head.bias, *norm_parameters.values())
    if reduction == "none":
        return _TokenLosses.apply(work, *inputs).view(targets_BT.shape)
    scale = loss_scale(reduction, normalizer, work.target_N, options.ignore_index, wide)
    return _SummedLoss.apply(work, scale, torch.is_grad_enabled(), *inputs)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Head:
    """The token-local function from hidden states to losses, and how it is cut."""

    norm: nn.Module
    names: tuple[str, ...]
    target_N: Tensor
    weight_N: Tensor | None
    options: LossOptions
    spans: list[Span]
    surroundings: Surroundings

    def normed(self, hidden_CE: Tensor, parameters: Sequence[Tensor], head_dtype: torch.dtype) -> Tensor:
        """What the projection sees; under autocast in its dtype, as a linear layer would take it."""
        with self.surroundings.restored():
            x_CE = functional_call(self.norm, dict(zip(self.names, parameters, strict=True)), (hidden_CE,))
        return x_CE.to(head_dtype)

    def head_dtype(self, weight_VE: Tensor) -> torch.dtype:
        device = weight_VE.device.type
        enabled = next((dtype for kind, on, dtype in self.surroundings.autocast if kind == device and on), None)
        return enabled or weight_VE.dtype

    def run(self, inputs: Sequence[Tensor], wanted: Sequence[bool], factor_N: Tensor | None, scale: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The sum of the losses times `scale` (and times `factor_N`, a factor for each), and its gradients by `inputs`."""
        hidden_NE, weight_VE, bias_V, *parameters = inputs
        dtype = self.head_dtype(weight_VE)
        weight_VE = weight_VE.detach().to(dtype)
        want_hidden, want_weight, want_bias, *want_parameters = wanted
        aliases = [p.detach().requires_grad_(want) for p, want in zip(parameters, want_parameters, strict=True)]
        upstream = want_hidden or any(want_parameters)
        buffer = workspace(max(map(len, self.spans), default=0), weight_VE.shape[0], weight_VE.device, dtype, self.options)
        dhidden_NE = torch.empty_like(hidden_NE) if want_hidden else None
        dweight_VE, dbias_V = (
            torch.zeros_like(t, dtype=scale.dtype) if want else None for t, want in ((weight_VE, want_weight), (bias_V, want_bias))
        )
        sums, total = GradientSums(len(parameters)), torch.zeros_like(scale)
        for span in self.spans:
            hidden_CE = hidden_NE[span.slice(0)].detach().requires_grad_(want_hidden)
            with torch.enable_grad():
                x_CE = self.normed(hidden_CE, aliases, dtype)
            part = chunk_loss_and_grad(
                x_CE.detach(),
                weight_VE,
                self.target_N[span.slice()],
                None if factor_N is None else factor_N[span.slice()],
                scale,
                self.options,
                want_dx=upstream,
                dweight_VE=dweight_VE,
                bias_V=bias_V,
                dbias_V=dbias_V,
                logits_buffer=buffer,
            )
            total += part.loss
            if upstream:
                leaves = [t for t in (hidden_CE, *aliases) if t.requires_grad]
                grads = list(torch.autograd.grad(x_CE, leaves, part.dx_CE))
                if want_hidden:
                    dhidden_NE[span.slice()] = grads.pop(0)
                for i in (i for i, want in enumerate(want_parameters) if want):
                    sums.add(i, grads.pop(0))
        return total, [dhidden_NE, dweight_VE, dbias_V, *sums.totals]


class _SummedLoss(torch.autograd.Function):
    """(hidden, head weight, head bias, norm parameters) -> scale * sum of the losses; gradients made in the forward."""

    @staticmethod
    def forward(ctx, work: _Head, scale: Tensor, grad: bool, *inputs: Tensor) -> Tensor:
        # Summed unscaled and multiplied in the backward: a small scale costs half types no bits.
        wanted = [grad and want for want in ctx.needs_input_grad[3:]]
        total, ctx.grads = work.run(inputs, wanted, work.weight_N, torch.ones_like(scale))
        ctx.scale = scale
        ctx.save_for_backward(*inputs[1:])  # not the hidden states: their gradient is all that is needed from here on
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        if ctx.grads is None:
            raise RuntimeError(
                "the streamed loss can be differentiated once: its gradients were handed over in the first backward; "
                "call forward again instead of using retain_graph=True"
            )
        grads, ctx.grads, factor = ctx.grads, None, dloss * ctx.scale
        dhidden, *rest = (None if grad is None else grad.mul_(factor) for grad in grads)
        return None, None, None, dhidden, *map(delivered, ctx.saved_tensors, rest)


class _TokenLosses(torch.autograd.Function):
    """(hidden, head weight, head bias, norm parameters) -> losses ``[N]``; the backward computes each chunk again."""

    @staticmethod
    def forward(ctx, work: _Head, *inputs: Tensor) -> Tensor:
        ctx.work = work
        ctx.save_for_backward(*inputs)
        hidden_NE, weight_VE, bias_V, *parameters = inputs
        dtype = work.head_dtype(weight_VE)
        options = work.options
        losses = []
        for span in work.spans:
            losses.append(
                linear_cross_entropy(
                    work.normed(hidden_NE[span.slice()], parameters, dtype),
                    weight_VE.to(dtype),
                    work.target_N[span.slice()],
                    bias=bias_V,
                    reduction="none",
                    token_weights=None if work.weight_N is None else work.weight_N[span.slice()],
                    ignore_index=options.ignore_index,
                    softcap=options.softcap,
                    z_loss=options.z_loss,
                    label_smoothing=options.label_smoothing,
                    chunk_tokens=len(span),
                )
            )
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss_N: Tensor):
        work, inputs = ctx.work, ctx.saved_tensors
        factor_N = dloss_N if work.weight_N is None else dloss_N * work.weight_N
        one = torch.ones((), dtype=dloss_N.dtype, device=dloss_N.device)
        _, grads = work.run(inputs, ctx.needs_input_grad[1:], factor_N, one)
        return None, grads[0], *map(delivered, inputs[1:], grads[1:])
