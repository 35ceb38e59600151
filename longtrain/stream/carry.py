"""The carry of attention: keys and values of the prefix, and in the backward pass their gradient accumulators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from longtrain.ops.attention import merge_attention
from longtrain.ops.mixers import AttentionMixer, LongConvMixer
from longtrain.ops.state_mixers import LaCTMixer, LinearAttentionMixer
from longtrain.span import Span
from longtrain.stream.conv_carry import ConvCarry
from longtrain.stream.protocol import CarrySpec, KVBlock
from longtrain.stream.sliding import Sliding, first_needed
from longtrain.stream.state_carry import StateCarry


def kv_carry_spec(kv_heads: int, head_dim: int, value_dim: int, dtype: torch.dtype) -> CarrySpec:
    """Footprint of K/V: (D + Dv) K elements a token, and as many accumulators in float32 or wider in the backward pass."""
    elements, wide = kv_heads * (head_dim + value_dim), torch.promote_types(dtype, torch.float32)
    return CarrySpec(
        kind="append",
        tensors=("k", "v"),
        bytes_per_token=elements * dtype.itemsize,
        adjoint_bytes_per_token=elements * wide.itemsize,
        adjoint_dtype=wide,
    )


class KVCarry:
    """Keys and values that a chunk's queries can see, on the device, in one buffer each, so that a chunk is one call of the kernel.

    Where no chunk sees the whole sequence (windows, packed documents) the carry `slides`: its buffers hold the longest stretch that one
    does, and in the backward pass it is given the keys chunk by chunk, the last first. Several blocks, where a subclass yields them,
    are merged by their LSE.
    """

    def __init__(self, mixer: AttentionMixer, spans: Sequence[Span]) -> None:
        self.mixer, self.spans, tokens = mixer, spans, spans[-1].stop if spans else 0
        self._first_needed = first_needed(spans, mixer.keys_for)
        reach = max((stop - first for stop, first in self._first_needed.items()), default=0)
        self.slides = reach < tokens
        self._k_BSKD, self._v_BSKD, self._dk_BSKD, self._dv_BSKD = (Sliding(reach, tokens) for _ in range(4))

    @property
    def spec(self) -> CarrySpec:
        k_BSKD, v_BSKD = (x[x.held] for x in (self._k_BSKD, self._v_BSKD))
        return kv_carry_spec(k_BSKD.shape[2], k_BSKD.shape[3], v_BSKD.shape[3], k_BSKD.dtype)

    def append(self, span: Span, k_BCKD: Tensor, v_BCKD: Tensor) -> None:
        for buffer, part in ((self._k_BSKD, k_BCKD), (self._v_BSKD, v_BCKD)):
            buffer.append(span, part, needed_from=self._first_needed.get(span.stop, 0))

    def first_needed(self, span: Span) -> int:
        """Start of the first chunk that the queries of `span` see."""
        return self._first_needed[span.stop]

    def prepend(self, span: Span, k_BCKD: Tensor, v_BCKD: Tensor, *, queries: Span) -> None:
        """Take keys that are missing, the last ones first; those behind `queries` are done with."""
        self._k_BSKD.prepend(span, k_BCKD, queries.stop)
        self._v_BSKD.prepend(span, v_BCKD, queries.stop)

    def written(self, span: Span) -> tuple[Tensor, Tensor]:
        return self._k_BSKD[span], self._v_BSKD[span]

    def blocks(self, span: Span) -> Iterable[KVBlock]:
        keys = self.mixer.keys_for(span)
        adjoints = (None if x.held is None else x[keys] for x in (self._dk_BSKD, self._dv_BSKD))
        return [KVBlock(keys, self._k_BSKD[keys], self._v_BSKD[keys], *adjoints)]

    def adjoint_blocks(self, span: Span) -> Iterable[KVBlock]:
        """The blocks with their gradient sums."""
        return self.blocks(span)

    def mix(self, span: Span, q_BCHD: Tensor, stored: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        if stored is not None:
            return stored
        merged = None
        for block in self.blocks(span):  # a sink is one more key: of the first block
            part = self.mixer.attend(span, block.span, q_BCHD, block.k_BSKD, block.v_BSKD, with_sinks=merged is None)
            merged = part if merged is None else merge_attention(*merged, *part)
        out_BCHD, lse_BCH = merged
        return out_BCHD.to(q_BCHD.dtype), lse_BCH  # merges are wide

    def mix_vjp(
        self, span: Span, q_BCHD: Tensor, out_BCHD: Tensor | None, lse_BCH: Tensor, dout_BCHD: Tensor, delta_BCH: Tensor | None = None
    ) -> Tensor:
        """`delta_BCH` may stand for `out_BCHD`, as in `AttentionMixer.attend_vjp`."""
        self._extend_adjoints(span)
        dq_BCHD = None
        for block in self.adjoint_blocks(span):
            part = self.mixer.attend_vjp(
                span, block.span, dout_BCHD, q_BCHD, block.k_BSKD, block.v_BSKD, out_BCHD, lse_BCH,
                dk=block.dk_BSKD, dv=block.dv_BSKD, with_sinks=dq_BCHD is None, delta=delta_BCH,
            )
            dq_BCHD = part if dq_BCHD is None else dq_BCHD + part
        return dq_BCHD

    def take_grad(self, span: Span, *, wide: bool = False) -> tuple[Tensor, Tensor]:
        """With `wide` the sums as they are, for who adds more to them."""
        dk, dv = self._dk_BSKD[span], self._dv_BSKD[span]
        return (dk, dv) if wide else (dk.to(self._k_BSKD[span].dtype), dv.to(self._v_BSKD[span].dtype))

    def _extend_adjoints(self, span: Span) -> None:
        """Zeros for the keys that the queries of `span` are the last to see."""
        for adjoint, values in ((self._dk_BSKD, self._k_BSKD), (self._dv_BSKD, self._v_BSKD)):
            adjoint.extend(self.mixer.keys_for(span), values[span], self.spec.adjoint_dtype)


CARRIES = {AttentionMixer: KVCarry, LongConvMixer: ConvCarry, LinearAttentionMixer: StateCarry, LaCTMixer: StateCarry}
"""Which carry streams which mixer. A mixer of the user's own brings ``make_carry(spans)`` and ``causal = True`` instead."""


def make_carry(mixer, spans: Sequence[Span]):
    """The carry of a causal mixer over a sequence streamed in `spans`. Raises TypeError for a mixer that has none."""
    if hasattr(mixer, "make_carry"):
        return mixer.make_carry(spans)
    if type(mixer) not in CARRIES:
        raise TypeError(f"{type(mixer).__name__} cannot be streamed along the sequence: give it make_carry(spans), or causal=False")
    return CARRIES[type(mixer)](mixer, spans)


def is_causal(mixer, chunk_tokens: int) -> bool:
    """Whether a mixer streams by span with a carry; otherwise it needs two passes."""
    short = getattr(mixer, "streams_by_span", None)
    return (hasattr(mixer, "make_carry") or type(mixer) in CARRIES) and mixer.causal and (short is None or short(chunk_tokens))
