"""The carry of a mixer with a state of fixed size: the state before a span, and in the backward pass its adjoint.

    out[span], state = step(span, state, q, ...)                                    forward, spans ascending; entry states are kept
    dq, ..., dstate = step_vjp(span, entry state, (q, ...), dout, dstate)           backward, spans descending

Nothing of the sequence is held: a span's entry state comes back from the token store, its inputs from the replay of its chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from longtrain.ops.state_mixers import LaCTMixer, LinearAttentionMixer
from longtrain.span import Span
from longtrain.stream.protocol import CarrySpec, KVBlock


class StateCarry:
    """It `resumes`: instead of appending the whole prefix again, replays give it the entry state and the inputs of one span."""

    resumes = True
    states = 1
    """Kept of each span."""

    def __init__(self, mixer: LinearAttentionMixer | LaCTMixer, spans: Sequence[Span]) -> None:
        self.mixer = mixer
        self.entry: Tensor | None = None
        """The state before the span that is held, ``[B, ...]``; None before the first token."""
        self._exit: Tensor | None = None
        self._dstate: Tensor | None = None
        self._written: tuple[Tensor, ...] = ()
        self._dwritten: Sequence[Tensor] = ()
        self._dshared = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in mixer.shared]

    @property
    def spec(self) -> CarrySpec:
        return state_spec(self.mixer, self._written, self.states)

    def append(self, span: Span, *written: Tensor) -> None:
        """The inputs of the span after the one that was mixed last."""
        self.resume(span, self._exit, *written)

    def resume(self, span: Span, entry: Tensor | None, *written: Tensor) -> None:
        """The entry state and the inputs of a span that was appended before, to mix or to differentiate it."""
        self.entry, self._written = entry, tuple(t.detach() for t in written)

    def mix(self, span: Span, q: Tensor, stored: tuple[Tensor, None] | None) -> tuple[Tensor, None]:
        if stored is not None:
            return stored
        with torch.no_grad():
            out, self._exit = self.mixer.step(span, self.entry, q, *self._written)
        return out, None

    def mix_vjp(self, span: Span, q: Tensor, out: Tensor, lse: None, dout: Tensor) -> Tensor:
        dinputs, self._dstate, dshared = self.mixer.step_vjp(span, self.entry, (q, *self._written), dout, self._dstate)
        for total, part in zip(self._dshared, dshared, strict=True):
            total += part
        dq, *self._dwritten = dinputs
        return dq

    def take_grad(self, span: Span) -> tuple[Tensor, ...]:
        taken, self._dwritten = tuple(self._dwritten), ()
        self.entry, self._written = None, ()
        return taken

    def shared_grads(self) -> list[Tensor]:
        """Gradients of the mixer's `shared` tensors, once every span has had its turn."""
        return self._dshared

    def blocks(self, span: Span) -> list[KVBlock]:
        return []


def state_spec(mixer: LinearAttentionMixer | LaCTMixer, written: Sequence[Tensor], states: int) -> CarrySpec:
    """Of a carry that keeps so many states of a span."""
    wide = torch.promote_types(written[0].dtype, torch.float32)
    return CarrySpec(
        kind="state",
        tensors=mixer.tensors,
        bytes_per_token=0,
        adjoint_bytes_per_token=0,
        adjoint_dtype=wide,
        state_bytes=states * prod(mixer.state_shape(*written)) * wide.itemsize,
        workspace=mixer.workspace(*written),
    )
