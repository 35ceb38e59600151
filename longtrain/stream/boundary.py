"""Layer boundaries that stream: stand-ins travel through the model and autograd, the contents live in the token store.

A stand-in has the true shape, dtype and device, stride 0 and NaN in it: whoever reads it without knowing gets NaN, not nonsense.
Two explicit autograd Functions convert at the ends of a run of streamed layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrain.offload import Stored, TokenStore, version_of
from longtrain.plan import Plan
from longtrain.span import Span

if TYPE_CHECKING:
    from longtrain.stream.call import Call


class BoundaryGradient(Stored):
    """A gradient by span that is still to be multiplied by one number, which its makers did not know yet."""

    factor: Tensor | None = None

    def take(self, span: Span) -> Tensor:
        grad = super().take(span)
        return grad if self.factor is None else grad * self.factor


class Boundary:
    """The hidden states that streamed layer `layer` is given, by span, and in the backward pass their gradient."""

    def __init__(self, store: TokenStore, plan: Plan, layer: int, shape: torch.Size, device: torch.device, spans: list[Span]) -> None:
        self.value = Stored(store, f"input of layer {layer}", plan.place("inputs", layer, shape[1]))
        self.grad = BoundaryGradient(store, f"gradient of the input of layer {layer}", plan.place("gradients", layer, shape[1]))
        self.shape, self.device, self.spans = shape, device, spans
        self.maker: Call | None = None
        """The call of layers that gave it out; None for an embedding's."""
        self._nan: Tensor | None = None

    @property
    def stand_in(self) -> Tensor:
        if self._nan is None:
            self._nan = torch.full((), torch.nan, dtype=self.value.dtype, device=self.device)
            self._version = version_of(self._nan)
        return self._nan.expand(self.shape)

    def is_behind(self, x: Tensor) -> bool:
        """Whether `x` is this boundary's stand-in, unchanged: it shares the one NaN, which aliases made by autograd and FSDP2 do too."""
        return x.data_ptr() == self._nan.data_ptr() and x.shape == self.shape and version_of(self._nan) == self._version


def gather(stored: Stored, boundary: Boundary) -> Tensor:
    """All spans of the boundary's value, or of its gradient, in one tensor; each extent is released as it is copied."""
    if len(boundary.spans) == 1:
        return stored.take(boundary.spans[0])
    whole = torch.empty(boundary.shape, dtype=boundary.value.dtype, device=boundary.device)
    for span in boundary.spans:
        whole[:, span.slice()] = stored.take(span)
    return whole


def scatter(stored: Stored, boundary: Boundary, x_BTE: Tensor) -> None:
    """The opposite: one tensor, by span."""
    for span in boundary.spans:
        stored.put(span, x_BTE[:, span.slice()])


class Enter(torch.autograd.Function):
    """Tensor to stand-in: ``[B, T, E]`` is put into the store by span."""

    @staticmethod
    def forward(ctx, x_BTE: Tensor, boundary: Boundary) -> Tensor:
        ctx.boundary = boundary
        scatter(boundary.value, boundary, x_BTE)
        return boundary.stand_in

    @staticmethod
    @once_differentiable
    def backward(ctx, dstand_in: Tensor):
        return gather(ctx.boundary.grad, ctx.boundary), None


class Leave(torch.autograd.Function):
    """Stand-in to tensor."""

    @staticmethod
    def forward(ctx, stand_in: Tensor, boundary: Boundary) -> Tensor:
        ctx.boundary = boundary
        return gather(boundary.value, boundary)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_BTE: Tensor):
        scatter(ctx.boundary.grad, ctx.boundary, dx_BTE)
        return ctx.boundary.stand_in, None
