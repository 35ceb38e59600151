"""The carry of attention: keys and values of the prefix, and in the backward pass their gradient accumulators."""

from __future__ import annotations

import torch
from torch import Tensor

from longtrain.ops.attention import attention, attention_backward, merge_attention
from longtrain.ops.mixers import AttentionMixer
from longtrain.span import Span
from longtrain.stream.protocol import CarrySpec, KVBlock


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
    """Keys and values of one layer's sequence, in one buffer each, on the device.

    A chunk's queries need one call of the kernel against ``[first visible key, end of chunk)``; several blocks, where a subclass
    yields them, are merged by their LSE.
    """

    def __init__(self, mixer: AttentionMixer, tokens: int) -> None:
        self.mixer, self.tokens = mixer, tokens
        self._k_BSKD: Tensor | None = None
        self._v_BSKD: Tensor | None = None
        self._dk_BSKD: Tensor | None = None
        self._dv_BSKD: Tensor | None = None

    @property
    def spec(self) -> CarrySpec:
        return kv_carry_spec(self._k_BSKD.shape[2], self._k_BSKD.shape[3], self._v_BSKD.shape[3], self._k_BSKD.dtype)

    def append(self, span: Span, k_BCKD: Tensor, v_BCKD: Tensor) -> None:
        if len(span) == self.tokens:
            self._k_BSKD, self._v_BSKD = k_BCKD, v_BCKD
            return
        if self._k_BSKD is None:
            self._k_BSKD, self._v_BSKD = (x.new_empty(x.shape[0], self.tokens, *x.shape[2:]) for x in (k_BCKD, v_BCKD))
        self._k_BSKD[:, span.slice()] = k_BCKD
        self._v_BSKD[:, span.slice()] = v_BCKD

    def written(self, span: Span) -> tuple[Tensor, Tensor]:
        return self._k_BSKD[:, span.slice()], self._v_BSKD[:, span.slice()]

    def blocks(self, span: Span) -> list[KVBlock]:
        keys = self.mixer.keys_for(span)
        tensors = (self._k_BSKD, self._v_BSKD, self._dk_BSKD, self._dv_BSKD)
        return [KVBlock(keys, *(None if x is None else x[:, keys.slice()] for x in tensors))]

    def mix(self, span: Span, q_BCHD: Tensor, stored: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        if stored is not None:
            return stored
        merged = None
        for block in self.blocks(span):
            arguments = self.mixer.arguments(span, block.span)
            part = attention(q_BCHD, block.k_BSKD, block.v_BSKD, **arguments, return_lse=True)
            merged = part if merged is None else merge_attention(*merged, *part)
        out_BCHD, lse_BCH = merged
        return out_BCHD.to(q_BCHD.dtype), lse_BCH  # merges are wide

    def mix_vjp(self, span: Span, q_BCHD: Tensor, out_BCHD: Tensor, lse_BCH: Tensor, dout_BCHD: Tensor) -> Tensor:
        if self._dk_BSKD is None:
            wide = self.spec.adjoint_dtype
            self._dk_BSKD, self._dv_BSKD = (torch.zeros_like(x, dtype=wide) for x in (self._k_BSKD, self._v_BSKD))
        dq_BCHD = None
        for block in self.blocks(span):
            arguments = self.mixer.arguments(span, block.span)
            part = attention_backward(
                dout_BCHD, q_BCHD, block.k_BSKD, block.v_BSKD, out_BCHD, lse_BCH, dk=block.dk_BSKD, dv=block.dv_BSKD, **arguments
            )
            dq_BCHD = part if dq_BCHD is None else dq_BCHD + part
        return dq_BCHD

    def take_grad(self, span: Span) -> tuple[Tensor, Tensor]:
        dk, dv = self._dk_BSKD[:, span.slice()], self._dv_BSKD[:, span.slice()]
        return dk.to(self._k_BSKD.dtype), dv.to(self._v_BSKD.dtype)


CARRIES = {AttentionMixer: KVCarry}
"""Which carry streams which mixer. A mixer of the user's own brings ``make_carry(tokens)`` and ``causal = True`` instead."""


def make_carry(mixer, tokens: int):
    """The carry of a causal mixer over a sequence of `tokens`. Raises TypeError for a mixer that has none."""
    if hasattr(mixer, "make_carry"):
        return mixer.make_carry(tokens)
    if type(mixer) not in CARRIES:
        raise TypeError(f"{type(mixer).__name__} cannot be streamed along the sequence: give it make_carry(tokens), or causal=False")
    return CARRIES[type(mixer)](mixer, tokens)


def is_causal(mixer) -> bool:
    """Whether a mixer streams by span with a carry; otherwise it needs two passes."""
    return (hasattr(mixer, "make_carry") or type(mixer) in CARRIES) and mixer.causal
