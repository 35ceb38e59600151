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

from longtrain.ops.linear_cross_entropy import (
    LossOptions,
    check_settings,
    check_targets,
    chunk_loss_and_grad,
    linear_cross_entropy,
    loss_scale,
    workspace,
)
from longtrain.span import Span
from longtrain.stream.boundary import Boundary
from longtrain.stream.head import StreamedHead
from longtrain.stream.replay import delivered
from longtrain.stream.segment import Chain
from longtrain.stream.work import Counting, Line, Work, lines, work_between


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
    chain: Chain | None = None,
    boundary: Boundary | None = None,
) -> Tensor:
    """As `longtrain.nn.TokenLoss.forward`, never holding more than `chunk_tokens` tokens' logits.

    `norm` is any token-local module; its parameters and the head's receive their gradients once. `chain`: the
    layers before, whose last boundary may be what `hidden_BTE` stands in for. `boundary`: what it does stand in for, where the caller
    knows; without gradients the hidden states then stay there. Raises ValueError for targets outside the vocabulary, and for settings that
    do not fit each other.
    """
    stays = boundary is not None and not torch.is_grad_enabled()
    if chain is not None and chain.boundary is not None:
        boundary = chain.take_boundary(hidden_BTE, "the loss")
    check_settings(targets_BT, token_weights_BT, reduction, normalizer)
    check_targets(targets_BT, head.out_features, options.ignore_index)
    wide = torch.promote_types(hidden_BTE.dtype, torch.float32)
    weights_BT = None if token_weights_BT is None else token_weights_BT.to(wide)
    streamed = StreamedHead.make(hidden_BTE, norm, head, boundary, chunk_tokens)
    work = _Losses(head=streamed, stays=stays, targets_BT=targets_BT, weights_BT=weights_BT, options=options)
    inputs = (hidden_BTE, head.weight, head.bias, *norm.parameters())
    if reduction == "none":
        return _TokenLosses.apply(work, *inputs)
    scale = loss_scale(reduction, normalizer, targets_BT, options.ignore_index, wide)
    return _SummedLoss.apply(work, scale, torch.is_grad_enabled(), *inputs)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Losses:
    """What is made of the hidden states, and which of them."""

    head: StreamedHead
    stays: bool
    """Whether the hidden states are left in the boundary."""
    targets_BT: Tensor
    weights_BT: Tensor | None
    options: LossOptions

    def run(
        self, inputs: Sequence[Tensor], wanted: Sequence[bool], factors_BT: Tensor | None, scale: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The sum of the losses times `scale` (and times `factors_BT`, a factor for each), and its gradients by `inputs`."""
        hidden_BTE, weight_VE, bias_V, *_ = inputs
        longest = hidden_BTE.shape[0] * min(self.head.logits_tokens, max(map(len, self.head.spans), default=0))
        buffer = workspace(longest, weight_VE.shape[0], weight_VE.device, self.head.dtype(weight_VE), self.options)
        total = torch.zeros_like(scale)

        def vjp_part(part: Span, x_CE: Tensor, cast_VE: Tensor, **wanted) -> Tensor | None:
            target_C = self.targets_BT[:, part.slice()].flatten()
            factors_C = None if factors_BT is None else factors_BT[:, part.slice()].flatten()
            result = chunk_loss_and_grad(
                x_CE, cast_VE, target_C, factors_C, scale, self.options, bias_V=bias_V, logits_buffer=buffer, **wanted
            )
            total.add_(result.loss)
            return result.dx_CE

        return total, self.head.vjp(inputs, wanted, scale.dtype, vjp_part, stays=self.stays)


PROBE_TOKENS = (24, 56)


def probe_loss(norm: nn.Module, head: nn.Linear, options: LossOptions = LossOptions()) -> tuple[tuple[Line, ...], Work]:
    """What `_Losses.run` holds of a part of so many tokens at its highest, beside hidden states and the sums of the head's gradient, and
    what it does of a part: for the planner, seen on two tiny examples (of the meta device, where the head is there)."""
    weight_VE = head.weight
    sums = weight_VE.numel() * max(weight_VE.element_size(), 4) if weight_VE.requires_grad else 0

    def run(part: int, parts: int) -> Counting:
        hidden_BTE = weight_VE.new_zeros(1, part * parts, head.in_features)
        targets_BT = torch.zeros(1, part * parts, dtype=torch.int64, device=weight_VE.device)
        streamed = StreamedHead.make(hidden_BTE, norm, head, None, part)
        work = _Losses(head=streamed, stays=False, targets_BT=targets_BT, weights_BT=None, options=options)
        inputs = (hidden_BTE, weight_VE, head.bias, *norm.parameters())
        wanted = [True, *(p is not None and p.requires_grad for p in inputs[1:])]
        with Counting(part) as counting, torch.no_grad():
            work.run(inputs, wanted, None, weight_VE.new_ones((), dtype=torch.promote_types(weight_VE.dtype, torch.float32)))
        return counting

    one, two = ([run(part, parts) for part in PROBE_TOKENS] for parts in (1, 2))  # what a second part adds is a part's
    held = lines([[level - sums for level in counting.levels] for counting in one], PROBE_TOKENS)
    return held, work_between([c.so_far() for c in one], [c.so_far() for c in two], PROBE_TOKENS)


class _SummedLoss(torch.autograd.Function):
    """(hidden, head weight, head bias, norm parameters) -> scale * sum of the losses; gradients made in the forward."""

    @staticmethod
    def forward(ctx, work: _Losses, scale: Tensor, grad: bool, *inputs: Tensor) -> Tensor:
        # Summed unscaled and multiplied in the backward: a small scale costs half types no bits.
        wanted = [grad and want for want in ctx.needs_input_grad[3:]]
        total, ctx.grads = work.run(inputs, wanted, work.weights_BT, torch.ones_like(scale))
        ctx.work, ctx.scale = work, scale
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
        (dhidden, *rest), ctx.grads, factor = ctx.grads, None, dloss * ctx.scale
        if (boundary := ctx.work.head.boundary) is not None:
            boundary.grad.factor = factor
        elif dhidden is not None:
            dhidden.mul_(factor)
        rest = (None if grad is None else grad.mul_(factor) for grad in rest)
        return None, None, None, dhidden, *map(delivered, ctx.saved_tensors, rest)


class _TokenLosses(torch.autograd.Function):
    """(hidden, head weight, head bias, norm parameters) -> losses ``[B, T]``; the backward computes each chunk again."""

    @staticmethod
    def forward(ctx, work: _Losses, *inputs: Tensor) -> Tensor:
        ctx.work = work
        ctx.save_for_backward(*inputs)
        hidden_BTE, weight_VE, bias_V, *parameters = inputs
        head, options, keep = work.head, work.options, any(ctx.needs_input_grad)
        dtype, hidden, losses = head.dtype(weight_VE), head.hidden(hidden_BTE), []
        for span in head.spans:
            x_BSE = hidden.get(span) if keep or work.stays else hidden.take(span)
            for part in head.parts(span):
                losses.append(
                    linear_cross_entropy(
                        head.normed(x_BSE[:, part.slice(span.start)], parameters, dtype),
                        weight_VE.to(dtype),
                        work.targets_BT[:, part.slice()],
                        bias=bias_V,
                        reduction="none",
                        token_weights=None if work.weights_BT is None else work.weights_BT[:, part.slice()],
                        ignore_index=options.ignore_index,
                        softcap=options.softcap,
                        z_loss=options.z_loss,
                        label_smoothing=options.label_smoothing,
                        chunk_tokens=x_BSE.shape[0] * len(part),
                    )
                )
        return torch.cat(losses, dim=1) if losses else hidden_BTE.new_zeros(hidden_BTE.shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss_BT: Tensor):
        work, inputs = ctx.work, ctx.saved_tensors
        factors_BT = dloss_BT if work.weights_BT is None else dloss_BT * work.weights_BT
        one = torch.ones((), dtype=dloss_BT.dtype, device=dloss_BT.device)
        _, grads = work.run(inputs, ctx.needs_input_grad[1:], factors_BT, one)
        return None, grads[0], *map(delivered, inputs[1:], grads[1:])
