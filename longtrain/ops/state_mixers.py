"""Mixers whose knowledge of the past is a state of fixed size: what they compute on a stretch of the sequence, given the state before it.

`step` is the mixer on a span; `step_vjp` its derivative, given those of the output and of the state behind the span. Called, a mixer runs
the whole sequence at once; the streaming engine runs the same description span by span (`longtrain.stream.state_carry`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from longtrain.ops import lact as test_time
from longtrain.ops.lact import lact
from longtrain.ops.linear_attention import flops, footprint_bytes, linear_attention, linear_attention_backward
from longtrain.span import Layout, Span

Derivatives = tuple[Sequence[Tensor], Tensor, Sequence[Tensor]]
"""Gradients of the inputs, of the entry state, of the shared tensors."""


@dataclass(frozen=True, kw_only=True)
class LinearAttentionMixer:
    """Linear attention; fields as in `longtrain.ops.linear_attention`. Inputs ``q, k [B, T, H, D]``, ``v [B, T, H, Dv]``, if `gated` then
    ``decay [B, T, H]`` or ``[B, T, H, D]``, if `delta` then ``beta [B, T, H]``; output ``[B, T, H, Dv]``."""

    gated: bool = False
    delta: bool = False
    scale: float | None = None
    chunk_size: int = 64
    documents: Layout | None = None
    backend: str = "auto"

    causal = True
    shared = ()
    """No tensors beside the inputs take part."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.step(Span(0, inputs[0].shape[1]), None, *inputs)[0]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the inputs after the query."""
        return ("k", "v", *(["decay"] * self.gated), *(["beta"] * self.delta))

    def state_shape(self, k_BTHD: Tensor, v_BTHV: Tensor, *rest: Tensor) -> tuple[int, ...]:
        """Of one row of the batch."""
        return (*k_BTHD.shape[2:], v_BTHV.shape[3])

    def workspace(self, k_BTHD: Tensor, v_BTHV: Tensor, *rest: Tensor) -> Callable[[int], int]:
        """Bytes that `step_vjp` of so many tokens holds beside what it is given, for a batch of one."""
        itemsize = torch.promote_types(k_BTHD.dtype, torch.float32).itemsize
        decays = 0 if not self.gated else 1 if rest[0].dim() == 3 else k_BTHD.shape[3]
        sizes = dict(heads=k_BTHD.shape[2], key_dim=k_BTHD.shape[3], value_dim=v_BTHV.shape[3], chunk_size=self.chunk_size)
        return partial(footprint_bytes, **sizes, decays=decays, delta=self.delta, itemsize=itemsize, device=k_BTHD.device.type)

    def work(self, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHV: Tensor, *rest: Tensor) -> dict[str, Callable[..., float]]:
        """FLOP of ``(tokens, backward=)`` for a batch of one, by what there is to do: the least of them counts (`longtrain.planner`)."""
        sizes = dict(heads=k_BTHD.shape[2], key_dim=k_BTHD.shape[3], value_dim=v_BTHV.shape[3], chunk_size=self.chunk_size)
        decay = "" if not self.gated else ", a decay a head" if rest[0].dim() == 3 else ", a decay a feature"
        return {("delta rule" if self.delta else "linear attention") + decay: partial(flops, **sizes, delta=self.delta)}

    def step(self, span: Span, state: Tensor | None, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention(
            *inputs[:3], **self._arguments(span, inputs), initial_state=state, return_state=True, backend=self.backend
        )

    def step_vjp(self, span: Span, state: Tensor | None, inputs: Sequence[Tensor], dout: Tensor, dstate: Tensor | None) -> Derivatives:
        *dinputs, dentry = linear_attention_backward(
            dout, *inputs[:3], **self._arguments(span, inputs), initial_state=state, dstate=dstate, backend=self.backend
        )
        return [grad for grad in dinputs if grad is not None], dentry, ()

    def with_shared(self) -> LinearAttentionMixer:
        return self

    def by_group(self, *inputs: Tensor) -> Iterator[tuple[slice, LinearAttentionMixer, tuple[Tensor, ...]]]:
        """One head at a time: (slice of the output's axis 2, mixer, inputs)."""
        for head in range(inputs[0].shape[2]):
            heads = slice(head, head + 1)
            yield heads, self, tuple(x[:, :, heads] for x in inputs)

    def _arguments(self, span: Span, inputs: Sequence[Tensor]) -> dict:
        named = dict(zip(self.tensors[2:], inputs[3:], strict=True))
        if self.documents is not None:
            (edges,) = self.documents.edges_within(span)
            begins = self.documents.first_visible(span.start) == span.start  # an empty document before it: the entry state is not its own
            named["cu_seqlens"] = torch.tensor((0, *edges) if begins else edges, dtype=torch.int32)
        return {**named, "scale": self.scale, "chunk_size": self.chunk_size}


@dataclass(frozen=True, kw_only=True)
class LaCTMixer:
    """Large-chunk test-time training; fields as in `longtrain.ops.lact`. Inputs ``q, k, v [B, T, H, D]``, ``rates [B, T, H, 3]``; output
    ``[B, T, H, D]``."""

    weights: Tensor
    """``[H, 3, F, D]``: what every document begins with."""

    chunk_tokens: int
    momentum: float = 0.0
    documents: Layout | None = None

    causal = True
    tensors = ("k", "v", "rates")

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.step(Span(0, inputs[0].shape[1]), None, *inputs)[0]

    def state_shape(self, *written: Tensor) -> tuple[int, ...]:
        heads, *matrices = self.weights.shape
        return (heads, 3, *matrices)

    def workspace(self, k_BTHD: Tensor, *rest: Tensor) -> Callable[[int], int]:
        heads, _, inner, dim = self.weights.shape
        itemsize = torch.promote_types(k_BTHD.dtype, torch.float32).itemsize
        return partial(test_time.footprint_bytes, heads=heads, dim=dim, inner=inner, chunk_tokens=self.chunk_tokens, itemsize=itemsize)

    def work(self, *inputs: Tensor) -> dict[str, Callable[..., float]]:
        """As of `LinearAttentionMixer`."""
        heads, _, inner, dim = self.weights.shape
        return {"test-time training": partial(test_time.flops, heads=heads, dim=dim, inner=inner)}

    def step(self, span: Span, state: Tensor | None, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        settings = dict(chunk_tokens=self.chunk_tokens, momentum=self.momentum, documents=self.documents)
        return lact(state, *inputs, self.weights, span=span, **settings)

    def step_vjp(self, span: Span, state: Tensor | None, inputs: Sequence[Tensor], dout: Tensor, dstate: Tensor | None) -> Derivatives:
        leaves = [t.detach().requires_grad_() for t in (*inputs, self.weights, *([] if state is None else [state]))]
        with torch.enable_grad():
            mixer, entry = self.with_shared(leaves[len(inputs)]), None if state is None else leaves[-1]
            out, behind = mixer.step(span, entry, *leaves[: len(inputs)])
        outs, douts = ([out], [dout]) if dstate is None else ([out, behind], [dout, dstate])
        grads = torch.autograd.grad(outs, leaves, douts, materialize_grads=True)
        return grads[: len(inputs)], grads[-1], grads[len(inputs) : len(inputs) + 1]

    @property
    def shared(self) -> tuple[Tensor]:
        """The tensors beside the inputs that take part, and receive gradients."""
        return (self.weights,)

    def with_shared(self, weights: Tensor) -> LaCTMixer:
        return replace(self, weights=weights)

    def by_group(self, *inputs: Tensor) -> Iterator[tuple[slice, LaCTMixer, tuple[Tensor, ...]]]:
        """One head at a time: (slice of the output's axis 2, mixer, inputs)."""
        for head in range(inputs[0].shape[2]):
            heads = slice(head, head + 1)
            yield heads, self.with_shared(self.weights[heads]), tuple(x[:, :, heads] for x in inputs)
