"""The contracts of streaming: what a layer offers, and what carries a mixer's knowledge along the sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from longtrain.span import Span


@runtime_checkable
class StreamableLayer(Protocol):
    """A layer that can be streamed: a token-local part, a sequence mixer, a token-local part (one or more times).

    ``forward(x [B, T, E], *, mix=None, **arguments) -> [B, T, E]``. It calls ``mix(q, k, v)`` (or whatever its mixer takes) once
    for each entry of `mixers`, in that order; nothing else in it may look at another token. With ``mix=None`` it mixes by itself.
    A layer with ``chooses = True`` (a mixture of experts) has the indices of its `torch.topk` calls stored, and its replays use them.
    """

    token_args: Mapping[str, int]
    """Keyword arguments that run along the tokens, with their token axis; they are cut with the chunk, all others passed whole."""

    def mixers(self, **arguments: Any) -> Sequence[Any]:
        """What each call of `mix` has to compute, e.g. `longtrain.ops.mixers.AttentionMixer`, for these arguments."""

    def example(self, tokens: int) -> tuple[Tensor, dict[str, Any]]:
        """A small random input and its arguments, on which `longtrain.apply` proves that the layer is what it seems."""

    def forward(self, x: Tensor, *, mix: Callable[..., Tensor] | None = None, **arguments: Any) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CarrySpec:
    """All that the planner sees of a carry."""

    kind: Literal["append", "state"]
    """`append`: grows with the prefix (keys and values). `state`: of fixed size (a matrix, fast weights)."""

    tensors: tuple[str, ...]
    """Names of what `append` takes, after the query."""

    bytes_per_token: int
    """Bytes a token that the carry holds in the forward pass (0 for a state)."""

    adjoint_bytes_per_token: int
    """Bytes a token that its gradient accumulators add in the backward pass."""

    adjoint_dtype: torch.dtype
    """Dtype of the accumulators: float32, or the inputs' dtype where that is wider."""

    state_bytes: int = 0
    """Bytes of the state, for a batch of one: every span's entry state is kept from forward to backward."""

    workspace: Callable[[int], int] | None = None
    """Bytes that `mix_vjp` of a span of so many tokens holds beside its inputs, for a batch of one; None where that is little."""


@dataclass(slots=True)
class KVBlock:
    """Keys and values of one span, with the accumulators of their gradients (None in the forward pass)."""

    span: Span
    k_BSKD: Tensor
    v_BSKD: Tensor
    dk_BSKD: Tensor | None = None
    dv_BSKD: Tensor | None = None


class Carry(Protocol):
    """What a mixer keeps along the sequence. One per layer and micro-batch, passed as an argument, never global."""

    @property
    def spec(self) -> CarrySpec: ...

    def append(self, span: Span, *written: Tensor) -> None:
        """Take the mixer's inputs (after the query) of a span; once per span, ascending."""

    def mix(self, span: Span, q: Tensor, stored: tuple[Tensor, Tensor | None] | None) -> tuple[Tensor, Tensor | None]:
        """Output and LSE of the queries of a span, or of a part of one. With `stored` given it is returned and no kernel runs. Pure."""

    def mix_vjp(self, span: Span, q: Tensor, out: Tensor, lse: Tensor | None, dout: Tensor) -> Tensor:
        """Gradient of q; gradients of what the span saw are added up inside. Spans strictly descending."""

    def take_grad(self, span: Span) -> tuple[Tensor, ...]:
        """Adjoint of ``append(span)``: final, since every later query has been handled. Once per span."""

    def blocks(self, span: Span) -> Iterable[KVBlock]:
        """The K/V blocks that a span's queries need, in an order that depends on (plan, layout, span) alone; one may be gone from the
        device when the next is asked for."""

    def written(self, span: Span) -> tuple[Tensor, ...]:
        """What `append` took for a span, to store it (kind "append" only)."""

    # A state carry that `resumes` (attribute, true) has `entry`, the state ``[B, ...]`` before the span mixed last (None before the
    # first, unless it says `begins_empty = False`), and resume(span, entry, *written): its inputs again, to mix or to differentiate it.
    # Entry states are kept in the token store, and whole spans are mixed. A state carry that does not is rebuilt from the first token
    # on, and holds what it needs.
    #
    # Of a mixer with `shared` tensors (filters) also: shared_grads() -> their gradients, once every span had its turn. Such a mixer's
    # `carried(mix, *inputs)` calls `mix(q, *written)` and does by itself what of it is token-local (gates).


class Spread(Protocol):
    """A sequence that is spread over processes, as the engine of one of them sees it: it runs on the tokens that this process holds."""

    spans: list[Span]
    """Where each chunk stands among those tokens: as many on every process, none of them empty."""

    def mixer(self, mixer: Any, layer: int, place: int) -> Any:
        """What mixes over the processes as `mixer`, the one of number `place` of a layer, does alone."""
