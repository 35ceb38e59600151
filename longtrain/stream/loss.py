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
from longtrain.stream.boundary import Boundary
from longtrain.stream.call import Sequenced, WholeTensor, announce
from longtrain.stream.replay import GradientSums, Surroundings, delivered
from longtrain.stream.segment import Chain
from longtrain.stream.work import Counting, Line, lines


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
    knows; without gradients the hidden states then stay there. Raises ValueError for targets outside the vocabulary.
    """
    stays = boundary is not None and not torch.is_grad_enabled()
    if chain is not None and chain.boundary is not None:
        boundary = chain.take_boundary(hidden_BTE, "the loss")
    batch, tokens = hidden_BTE.shape[:2]
    spans = chunk_spans(tokens, tokens or 1) if boundary is None else boundary.spans
    check_targets(targets_BT, head.out_features, options.ignore_index)
    norm_parameters = dict(norm.named_parameters())
    wide = torch.promote_types(hidden_BTE.dtype, torch.float32)
    logits_tokens = chunk_tokens or default_chunk_tokens(head.out_features, hidden_BTE.device, hidden_BTE.dtype)
    work = _Head(
        norm=norm,
        names=tuple(norm_parameters),
        boundary=boundary,
        stays=stays,
        targets_BT=targets_BT,
        weights_BT=None if token_weights_BT is None else token_weights_BT.to(wide),
        options=options,
        spans=spans,
        logits_tokens=max(1, logits_tokens // max(batch, 1)),
        surroundings=Surroundings.capture(hidden_BTE.device),
    )
    inputs = (hidden_BTE, head.weight, head.bias, *norm_parameters.values())
    if reduction == "none":
        return _TokenLosses.apply(work, *inputs)
    scale = loss_scale(reduction, normalizer, targets_BT, options.ignore_index, wide)
    return _SummedLoss.apply(work, scale, torch.is_grad_enabled(), *inputs)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Head:
    """The token-local function from hidden states to losses, and how it is cut."""

    norm: nn.Module
    names: tuple[str, ...]
    boundary: Boundary | None
    stays: bool
    """Whether the hidden states are left in the boundary."""
    targets_BT: Tensor
    weights_BT: Tensor | None
    options: LossOptions
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

    def normed(self, hidden_CE: Tensor, parameters: Sequence[Tensor], head_dtype: torch.dtype) -> Tensor:
        """What the projection sees; under autocast in its dtype, as a linear layer would take it."""
        with self.surroundings.restored():
            x_CE = functional_call(self.norm, dict(zip(self.names, parameters, strict=True)), (hidden_CE,))
        return x_CE.to(head_dtype)

    def head_dtype(self, weight_VE: Tensor) -> torch.dtype:
        device = weight_VE.device.type
        enabled = next((dtype for kind, on, dtype in self.surroundings.autocast if kind == device and on), None)
        return enabled or weight_VE.dtype

    def run(
        self, inputs: Sequence[Tensor], wanted: Sequence[bool], factors_BT: Tensor | None, scale: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The sum of the losses times `scale` (and times `factors_BT`, a factor for each), and its gradients by `inputs`.

        The gradient of hidden states that stream goes into the boundary, and what is returned for it is the stand-in.
        """
        hidden_BTE, weight_VE, bias_V, *parameters = inputs
        dtype = self.head_dtype(weight_VE)
        weight_VE = weight_VE.detach().to(dtype)
        want_hidden, want_weight, want_bias, *want_parameters = wanted
        aliases = [p.detach().requires_grad_(want) for p, want in zip(parameters, want_parameters, strict=True)]
        upstream = want_hidden or any(want_parameters)
        longest = hidden_BTE.shape[0] * min(self.logits_tokens, max(map(len, self.spans), default=0))
        buffer = workspace(longest, weight_VE.shape[0], weight_VE.device, dtype, self.options)
        hidden, dhidden = self.hidden(hidden_BTE), WholeTensor(hidden_BTE.shape[1]) if self.boundary is None else self.boundary.grad
        dweight_VE, dbias_V = (
            torch.zeros_like(t, dtype=scale.dtype) if want else None for t, want in ((weight_VE, want_weight), (bias_V, want_bias))
        )
        sums, total = GradientSums(len(parameters)), torch.zeros_like(scale)
        if self.boundary is not None:
            announce(self.boundary.value.store, ((hidden, span) for span in self.spans))
        for span in self.spans:
            x_BSE = hidden.get(span) if self.stays else hidden.take(span)
            dx_BSE = torch.empty_like(x_BSE) if want_hidden else None
            for part in self.parts(span):
                x_BCE = x_BSE[:, part.slice(span.start)].detach().requires_grad_(want_hidden)
                with torch.enable_grad():
                    normed_NE = self.normed(x_BCE, aliases, dtype).flatten(0, 1)
                result = chunk_loss_and_grad(
                    normed_NE.detach(),
                    weight_VE,
                    self.targets_BT[:, part.slice()].flatten(),
                    None if factors_BT is None else factors_BT[:, part.slice()].flatten(),
                    scale,
                    self.options,
                    want_dx=upstream,
                    dweight_VE=dweight_VE,
                    bias_V=bias_V,
                    dbias_V=dbias_V,
                    logits_buffer=buffer,
                )
                total += result.loss
                if upstream:
                    leaves = [t for t in (x_BCE, *aliases) if t.requires_grad]
                    grads = list(torch.autograd.grad(normed_NE, leaves, result.dx_CE))
                    if want_hidden:
                        dx_BSE[:, part.slice(span.start)] = grads.pop(0)
                    for i in (i for i, want in enumerate(want_parameters) if want):
                        sums.add(i, grads.pop(0))
            if want_hidden:
                dhidden.put(span, dx_BSE)
        if want_hidden:
            dhidden = dhidden.tensor if self.boundary is None else self.boundary.stand_in
        return total, [dhidden if want_hidden else None, dweight_VE, dbias_V, *sums.totals]


PROBE_TOKENS = (24, 56)


def loss_lines(norm: nn.Module, head: nn.Linear, options: LossOptions = LossOptions()) -> tuple[Line, ...]:
    """What `_Head.run` holds of a part of so many tokens at its highest, beside hidden states and the sums of the head's gradient: for the
    planner, seen on two tiny examples (of the meta device, where the head is there)."""
    levels = []
    weight_VE, parameters = head.weight, dict(norm.named_parameters())
    sums = weight_VE.numel() * max(weight_VE.element_size(), 4) if weight_VE.requires_grad else 0
    for tokens in PROBE_TOKENS:
        hidden_BTE = weight_VE.new_zeros(1, tokens, head.in_features)
        work = _Head(
            norm=norm, names=tuple(parameters), boundary=None, stays=False, targets_BT=torch.zeros(1, tokens, dtype=torch.int64, device=weight_VE.device),
            weights_BT=None, options=options, spans=[Span(0, tokens)], logits_tokens=tokens,
            surroundings=Surroundings.capture(torch.device("cpu")),
        )  # fmt: skip
        inputs = (hidden_BTE, weight_VE, head.bias, *parameters.values())
        wanted = [True, *(p is not None and p.requires_grad for p in inputs[1:])]
        with Counting(tokens) as counting, torch.no_grad():
            work.run(inputs, wanted, None, torch.ones((), dtype=torch.promote_types(weight_VE.dtype, torch.float32), device=weight_VE.device))
        levels.append([level - sums for level in counting.levels])
    return lines(levels, PROBE_TOKENS)


class _SummedLoss(torch.autograd.Function):
    """(hidden, head weight, head bias, norm parameters) -> scale * sum of the losses; gradients made in the forward."""

    @staticmethod
    def forward(ctx, work: _Head, scale: Tensor, grad: bool, *inputs: Tensor) -> Tensor:
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
        if ctx.work.boundary is not None:
            ctx.work.boundary.grad.factor = factor
        elif dhidden is not None:
            dhidden.mul_(factor)
        rest = (None if grad is None else grad.mul_(factor) for grad in rest)
        return None, None, None, dhidden, *map(delivered, ctx.saved_tensors, rest)


class _TokenLosses(torch.autograd.Function):
    """(hidden, head weight, head bias, norm parameters) -> losses ``[B, T]``; the backward computes each chunk again."""

    @staticmethod
    def forward(ctx, work: _Head, *inputs: Tensor) -> Tensor:
        ctx.work = work
        ctx.save_for_backward(*inputs)
        hidden_BTE, weight_VE, bias_V, *parameters = inputs
        dtype, options, keep = work.head_dtype(weight_VE), work.options, any(ctx.needs_input_grad)
        hidden, losses = work.hidden(hidden_BTE), []
        for span in work.spans:
            x_BSE = hidden.get(span) if keep or work.stays else hidden.take(span)
            for part in work.parts(span):
                losses.append(
                    linear_cross_entropy(
                        work.normed(x_BSE[:, part.slice(span.start)], parameters, dtype),
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
