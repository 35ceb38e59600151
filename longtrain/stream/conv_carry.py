"""The carry of a causal convolution with a filter that is short against the chunk: the last W - 1 inputs, which slide along the sequence.

    y[span] = k * v[span.start - W + 1 : span.stop], the last outputs of it

Backward, chunks in reverse order: the gradient of a chunk's output goes to its inputs and to those before it, which are held in wide
sums until their own turn; the filter and the skip gather theirs from all chunks, and the engine hands them on at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from longtrain.ops.long_conv import long_conv, long_conv_backward
from longtrain.ops.mixers import LongConvMixer
from longtrain.span import Span
from longtrain.stream.protocol import CarrySpec, KVBlock
from longtrain.stream.sliding import Sliding, first_needed


class ConvCarry:
    """`mix` takes an empty query: the gates are token-local and stay outside (`LongConvMixer.carried`), so there is nothing but v."""

    def __init__(self, mixer: LongConvMixer, spans: Sequence[Span], first: dict[int, int] | None = None) -> None:
        """`first`: by the end of each chunk, the start of the first one that it depends on; None: as `spans` are positions, they say it."""
        self.mixer, tokens = mixer, spans[-1].stop if spans else 0
        self._first_needed = first_needed(spans, mixer.keys_for) if first is None else first
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
            workspace=partial(_workspace, v_BSE.shape[2], *self.mixer.filter.shape, _wide(v_BSE.dtype).itemsize),
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
        out_BSE = long_conv(self._v_BSE[keys], *self.mixer.shared, **self._options(keys))
        # A view would keep the outputs before the span alive where this one is stored.
        return out_BSE if keys == span else out_BSE[:, span.slice(keys.start)].clone(), None

    def mix_vjp(self, span: Span, q: Tensor, out: Tensor, lse: None, dout_BCE: Tensor) -> Tensor:
        keys = self.mixer.keys_for(span)
        dv_BSE = self._differentiate(keys, span, self._v_BSE[keys], dout_BCE)
        self._dv_BSE.extend(keys, dv_BSE, self.spec.adjoint_dtype)
        self._dv_BSE[keys].add_(dv_BSE)
        return torch.zeros_like(q)

    def _differentiate(self, keys: Span, span: Span, v_BSE: Tensor, dout_BCE: Tensor) -> Tensor:
        """The gradient of the inputs `keys`, wide, by their outputs of `span`; those of the shared tensors go to their sums."""
        given = (v_BSE, *self.mixer.shared)
        wide = reduce(torch.promote_types, (t.dtype for t in given), torch.float32)
        v_BSE, filter_HW, skip_E = (t.to(wide) for t in given)
        dy_BSE = torch.zeros_like(v_BSE)  # of the outputs before the span nothing is asked here
        dy_BSE[:, span.slice(keys.start)] = dout_BCE
        dv_BSE, *dshared = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (v_BSE, filter_HW, skip_E))
        long_conv_backward(dy_BSE, v_BSE, filter_HW, skip_E, **self._options(keys), du=dv_BSE, dk=dshared[0], dskip=dshared[1])
        for total, part in zip(self._dshared, dshared, strict=True):
            total += part
        return dv_BSE

    def take_grad(self, span: Span) -> tuple[Tensor]:
        return (self._dv_BSE[span].to(self._v_BSE[span].dtype),)

    def shared_grads(self) -> list[Tensor]:
        """Gradients of the mixer's `shared` tensors, once every span has had its turn."""
        return self._dshared

    def _options(self, keys: Span) -> dict[str, Any]:
        documents = self.mixer.documents
        cu_seqlens = None if documents is None else torch.tensor(documents.edges_within(keys)[0], dtype=torch.int32)
        return {"cu_seqlens": cu_seqlens, "backend": self.mixer.backend}


def _workspace(channels: int, filters: int, taps: int, itemsize: int, tokens: int) -> int:
    """Of `mix_vjp`: inputs and gradients of outputs and inputs as far as the filter reaches back, the filter's gradient."""
    return (3 * (tokens + taps - 1) * channels + filters * taps) * itemsize


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
