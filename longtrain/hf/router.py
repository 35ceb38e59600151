"""Router logits of streamed mixtures of experts: those of the whole sequence, for losses that balance experts.

A load-balancing loss is a function of expert counts and mean probabilities over all tokens and layers; formed chunk by chunk it has right
values and wrong gradients. Here each streamed layer's router logits are collected in the forward pass, ``[B, T, experts]``, and handed out
behind the layer (`_Emitted`), so that the loss is the model's own. Its gradient by them arrives before the layer's backward pass begins,
since that waits for everything that came of its output; the replay of each chunk then takes its part (`Tied`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from longtrain.span import Span


def routers_of(models: list[PreTrainedModel], layer: nn.Module) -> list[tuple[nn.Module, int]]:
    """The router modules in a layer, by what the model says of itself (`_can_record_outputs`), and which of their outputs the logits
    are."""
    recorders = [r for model in models if (r := (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")) is not None]
    kinds = {r.target_class: r.index for r in recorders if isinstance(r, OutputRecorder)}
    return [(module, kinds[type(module)]) for module in layer.modules() if type(module) in kinds]


class Collected:
    """The router logits of one call of one layer, and in the backward pass their gradients."""

    def __init__(self, batch: int, tokens: int, routers: int) -> None:
        self.batch, self.tokens = batch, tokens
        self.logits_BTX: list[Tensor | None] = [None] * routers
        self.grads_BTX: list[Tensor | None] = [None] * routers

    def chunk(self, span: Span, logits: list[Tensor], y: Tensor) -> Tensor:
        """Take a chunk's logits in the forward pass; in its replay, the layer's output `y` with their gradients tied to it."""
        if torch.is_grad_enabled():
            known = [(part, grad) for part, grad in zip(logits, self.grads_BTX, strict=True) if grad is not None]
            extras = [grad[:, span.slice()].reshape(part.shape) for part, grad in known]
            return Tied.apply(extras, y, *(part for part, _ in known)) if known else y
        for router, part in enumerate(logits):
            if self.logits_BTX[router] is None:
                self.logits_BTX[router] = part.new_empty(self.batch, self.tokens, part.shape[-1])
            self.logits_BTX[router][:, span.slice()] = part.view(self.batch, len(span), -1)
        return y

    def behind(self, y: Tensor) -> list[Tensor]:
        """All logits ``[B T, experts]``, as routers give them out, in the graph of the layer's output."""
        return [_Emitted.apply(self, router, y).flatten(0, 1) for router in range(len(self.logits_BTX))]


class _Emitted(torch.autograd.Function):
    """Layer output -> router logits; the backward keeps their gradient for the layer's own backward, which comes after it."""

    @staticmethod
    def forward(ctx, collected: Collected, router: int, y: Tensor) -> Tensor:
        ctx.collected, ctx.router = collected, router
        return collected.logits_BTX[router]

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits_BTX: Tensor):
        ctx.collected.grads_BTX[ctx.router] = dlogits_BTX
        return None, None, None


class Tied(torch.autograd.Function):
    """(layer output, logits that nothing reads any more) -> layer output; the backward gives the logits the gradients that came for
    them."""

    @staticmethod
    def forward(ctx, extras: list[Tensor], y: Tensor, *logits: Tensor) -> Tensor:
        ctx.extras = extras
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return None, dy, *ctx.extras


def give_out(layers: list[Any], module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """After the decoder: put the collected logits of `layers` (`AdaptedLayer`) where transformers put those of the single chunks."""
    if not kwargs.get("output_router_logits") or kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
        return None  # with a cache the layers ran whole
    emitted = [logits for layer in layers for logits in layer.take_emitted()]
    if len(emitted) != sum(len(layer.routers) for layer in layers):
        raise ValueError("output_router_logits=True, and not every layer with experts is streamed and given that argument; leave it off")
    output["router_logits"] = tuple(emitted)
    return output
