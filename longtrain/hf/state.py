"""Convolutions and recurrent states of hybrid models, carried from chunk to chunk through the layer's own cache.

A layer that can decode token by token asks its cache for the inputs that its convolution still reaches and for the state that its
recurrence has come to, and gives back the new ones. Asked chunk by chunk, it streams: `States` keeps what was given back at the end of
each chunk, and in the backward pass, which takes the last chunk first, hands each replay the gradient of the state that it ended in:

    y, state' = layer(x[span], state)          dx[span], dparams, dstate = vjp(dy[span], dstate')

Nothing is wrapped or patched; `longtrain.proof` says whether the layer keeps all that it knows in its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrain.hf.router import Tied
from longtrain.offload import version_of
from longtrain.span import Span
from longtrain.stream.replay import Arguments

Key = tuple[str, int]
"""("conv" or "recurrent", the layer's number for it)."""


class ChunkCache:
    """What a layer is given as its cache for one chunk, in the terms of `transformers.Cache`. Nothing is edited in place."""

    def __init__(self, before: dict[Key, Tensor]) -> None:
        self.before, self.after = before, dict[Key, Tensor]()
        self._versions = {key: version_of(state) for key, state in before.items()}

    def check_unchanged(self) -> None:
        """Raise ValueError where the layer has edited a state instead of giving back another."""
        if any(version_of(state) != self._versions[key] for key, state in self.before.items()):
            raise ValueError(
                "the layer edits its state in place when it is given one token, as in decoding, and the state is needed for the "
                "backward pass: choose chunk_tokens so that no chunk, the last one too, has a single token"
            )

    def update(self, k: Tensor, v: Tensor, layer_idx: int, **unused: Any) -> tuple[Tensor, Tensor]:
        """As they are: attention beside the states has a carry of its own."""
        return k, v

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.before.get(("conv", state_idx))

    def update_conv_state(
        self, x: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **unused: Any
    ) -> Tensor:
        """``x [B, channels, tokens]`` with the inputs before it, of which as many are kept as the kernel is long."""
        before = self.get_conv_state(layer_idx, state_idx)
        kernel = conv_kernel_size or (x if before is None else before).shape[-1]
        whole = x if before is None else torch.cat([before, x], dim=-1)
        whole = F.pad(whole, (max(0, kernel - whole.shape[-1]), 0))
        self.after["conv", state_idx] = whole[..., whole.shape[-1] - kernel :]
        return whole

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.before.get(("recurrent", state_idx))

    def update_recurrent_state(self, state: Tensor, layer_idx: int, state_idx: int = 0, **unused: Any) -> Tensor:
        self.after["recurrent", state_idx] = state
        return state

    def is_recording_past(self, layer_idx: int) -> bool:
        """True: convolutions that step by one token edit the state in place, and are left out then."""
        return True

    def __getattr__(self, name: str) -> Any:
        raise NotCarried(f"it asks its cache for {name}, which is not carried from chunk to chunk")


class NotCarried(AttributeError):
    """A layer asks its cache for something that this one does not have."""


class TokensBefore:
    """What a layer is given as its cache for one chunk, where it asks how many tokens came before: it answers, and keeps nothing."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.asked = tokens, False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        self.asked = True
        return self.tokens

    def update(self, key: Tensor, value: Tensor, *unused: Any, **more: Any) -> tuple[Tensor, Tensor]:
        return key, value

    def __getattr__(self, name: str) -> Any:
        raise NotCarried(f"it asks its cache for {name}, which is not carried from chunk to chunk")


class States:
    """The states of one call of one layer at the edges of its chunks, and in the backward pass their gradients."""

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._at: dict[int, dict[Key, Tensor]] = {0: {}}
        self._grads: dict[int, dict[Key, Tensor]] = {}

    def run(self, span: Span, x: Tensor, arguments: Arguments, parameters: Sequence[Tensor], layer: Callable[..., Any]) -> Tensor:
        """``layer(x, arguments, states before)`` -> its output, and the states behind: of a chunk, or of its replay."""
        y, behind = layer(x, arguments.on(Span(0, len(span))), self.enter(span, (x, *parameters)))
        return self.leave(span, behind, y)

    def enter(self, span: Span, anchors: tuple[Tensor, ...]) -> dict[Key, Tensor]:
        """The states before a chunk. In a replay they are in its graph, as if made of `anchors`, whatever of these wants gradients."""
        before = self._at[span.start]
        if before and torch.is_grad_enabled():
            grads = self._grads.setdefault(span.start, {})
            before = dict(zip(before, _Enter.apply(grads, tuple(before), *before.values(), *anchors), strict=True))
        return before

    def leave(self, span: Span, behind: dict[Key, Tensor], y: Tensor) -> Tensor:
        """The chunk's output; in a replay with the gradient of the states behind it tied to it."""
        if not torch.is_grad_enabled():
            self._at[span.stop] = {key: state.clone() for key, state in behind.items()}
            if not self._keep and span.start:
                del self._at[span.start]
            return y
        grads = self._grads.pop(span.stop, {})
        return Tied.apply(list(grads.values()), y, *(behind[key] for key in grads)) if grads else y


class _Enter(torch.autograd.Function):
    """(states, anchors) -> states; the backward keeps their gradients for the chunk before."""

    @staticmethod
    def forward(ctx, grads: dict[Key, Tensor], keys: tuple[Key, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.grads, ctx.keys, ctx.inputs = grads, keys, len(tensors)
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors[: len(keys)])

    @staticmethod
    @once_differentiable
    def backward(ctx, *dstates: Tensor | None):
        ctx.grads.update({key: grad for key, grad in zip(ctx.keys, dstates, strict=True) if grad is not None})
        return None, None, *[None] * ctx.inputs
