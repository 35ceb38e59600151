"""The carry of a causal convolution with a filter that is short against the chunk: the last W - 1 inputs, which slide along the sequence.

    y[span] = k * v[span.start - W + 1 : span.stop], the last outputs of it

Backward, chunks in reverse order: the gradient of a chunk's output goes to its inputs and to those before it, which are held in wide
sums until their own turn; the filter and the skip gather theirs from all chunks, and the engine hands them on at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longtrain.ops.long_conv import long_conv
from longtrain.ops.mixers import LongConvMixer
from longtrain.span import Span
from longtrain.stream.protocol import CarrySpec, KVBlock
from longtrain.stream.sliding import Sliding, first_needed


class ConvCarry:
    """`mix` takes an empty query: the gates are token-local and stay outside (`LongConvMixer.carried`), so there is nothing but v."""

    def __init__(self, mixer: LongConvMixer, spans: Sequence[Span]) -> None:
        self.mixer, tokens = mixer, spans[-1].stop if spans else 0
        self._first_needed = first_needed(spans, mixer.keys_for)
        reach = max((stop - first for stop, first in self._first_needed.items()), default=0)
        self.slides = reach < tokens
        self._v_BSE, self._dv_BSE = Sliding(reach, tokens), Sliding(reach, tokens)
        self._dshared = [torch.zeros_like(t, dtype=_wide(t.dtype)) for t in mixer.shared]

    @property
    def spec(self) -> CarrySpec:
        v_BSE = self._v_BSE[self._v_BSE.held]
        return CarrySpec(
            kind="append",
            tensors=("v",),
            bytes_per_token=v_BSE.shape[2] * v_BSE.itemsize,
            adjoint_bytes_per_token=v_BSE.shape[2] * _wide(v_BSE.dtype).itemsize,
            adjoint_dtype=_wide(v_BSE.dtype),
        )

    def append(self, span: Span, v_BCE: Tensor) -> None:
        self._v_BSE.append(span, v_BCE, needed_from=self._first_needed.get(span.stop, 0))

    def first_needed(self, span: Span) -> int:
        """Start of the first chunk that the outputs of `span` depend on."""
        return self._first_needed[span.stop]

    def prepend(self, span: Span, v_BCE: Tensor, *, queries: Span) -> None:
        """Take inputs that are missing, the last ones first; those behind `queries` are done with."""
        self._v_BSE.prepend(span, v_BCE, queries.stop)

    def written(self, span: Span) -> tuple[Tensor]:
        return (self._v_BSE[span],)

    def blocks(self, span: Span) -> list[KVBlock]:
        return []

    def mix(self, span: Span, q: Tensor, stored: tuple[Tensor, None] | None) -> tuple[Tensor, None]:
        if stored is not None:
            return stored
        keys = self.mixer.keys_for(span)
        return self._convolve(span, keys, self._v_BSE[keys], *self.mixer.shared), None

    def mix_vjp(self, span: Span, q: Tensor, out: Tensor, lse: None, dout_BCE: Tensor) -> Tensor:
        keys = self.mixer.keys_for(span)
        leaves = [t.detach().to(_wide(t.dtype)).requires_grad_() for t in (self._v_BSE[keys], *self.mixer.shared)]
        with torch.enable_grad():
            out_BCE = self._convolve(span, keys, *leaves)
        dv_BSE, *dshared = torch.autograd.grad(out_BCE, leaves, dout_BCE.to(out_BCE.dtype))
        self._dv_BSE.extend(keys, dv_BSE, self.spec.adjoint_dtype)
        self._dv_BSE[keys].add_(dv_BSE)
        for total, part in zip(self._dshared, dshared, strict=True):
            total += part
        return torch.zeros_like(q)

    def take_grad(self, span: Span) -> tuple[Tensor]:
        return (self._dv_BSE[span].to(self._v_BSE[span].dtype),)

    def shared_grads(self) -> list[Tensor]:
        """Gradients of the mixer's `shared` tensors, once every span has had its turn."""
        return self._dshared

    def _convolve(self, span: Span, keys: Span, v_BSE: Tensor, filter_EW: Tensor, skip_E: Tensor) -> Tensor:
        cu_seqlens = None
        if self.mixer.documents is not None:
            cu_seqlens = torch.tensor(self.mixer.documents.edges_within(keys)[0], dtype=torch.int32)
        return long_conv(v_BSE, filter_EW, skip_E, cu_seqlens=cu_seqlens, backend=self.mixer.backend)[:, span.slice(keys.start)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
