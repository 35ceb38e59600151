"""Keys and values in blocks that lie in the token store: of a layer that sees the whole sequence only a few blocks are on the device.

The queries of a chunk meet one block after the other, first to last, in the forward and in the backward pass, where a block's gradient
sums come and go with it (FPDT's order within a chunk, arXiv:2408.16978). Parts of the softmax are merged by their LSE. Which block is
where changes no order and no operation, so the bits depend on the plan's block length alone.

Moved for each chunk of n: the K/V before it, and in the backward pass their float32 sums, there and back: n / 2 times a layer's K/V in all
(where queries travel between processes, for each visit of theirs).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from longtrain.offload import Stored
from longtrain.span import Span
from longtrain.stream.carry import KVCarry, kv_carry_spec
from longtrain.stream.protocol import CarrySpec, KVBlock

NewStored = Callable[..., Stored]
"""``stored(name, tokens, sums=False)``: where a layer's tensor of so many tokens goes; `sums`: gradient sums, which stay as they are."""


class BlockKVCarry(KVCarry):
    """Lives from the forward pass to the end of the backward pass: what was appended stays in the store.

    On the device are the block that is worked on, and in the backward pass the sums of the block that the chunk itself lies in.
    """

    slides = False
    keeps = True

    def __init__(self, mixer, spans: Sequence[Span], chunks: int, stored: NewStored) -> None:
        """`mixer` says by `keys_for` which keys the queries of a span see. `spans`: what is appended; `chunks` of them are a block."""
        self.mixer, self._starts, tokens = mixer, [span.start for span in spans[::chunks]], spans[-1].stop
        values, sums = ([stored(of + name, tokens, sums=bool(of)) for name in ("k", "v")] for of in ("", "gradient of "))
        (self._k, self._v), (self._dk, self._dv) = values, sums
        self._spec: CarrySpec | None = None
        self._own: KVBlock | None = None  # in the backward pass: the sums of the chunk's own block, as far as its queries see it
        self._summed: set[Span] = set()

    @property
    def spec(self) -> CarrySpec:
        return self._spec

    def append(self, span: Span, k_BCKD: Tensor, v_BCKD: Tensor) -> None:
        self._spec = kv_carry_spec(k_BCKD.shape[2], k_BCKD.shape[3], v_BCKD.shape[3], k_BCKD.dtype)
        for stored, part in ((self._k, k_BCKD), (self._v, v_BCKD)):
            stored.put(span, part if part.untyped_storage().nbytes() == part.nbytes else part.clone())

    def written(self, span: Span) -> tuple[Tensor, Tensor]:
        return self._k.get(span), self._v.get(span)

    def blocks(self, span: Span) -> Iterator[KVBlock]:
        spans = self._spans(span)
        self._announce((stored, part) for part in spans for stored in (self._k, self._v))
        for part in spans:
            yield KVBlock(part, *self.written(part))

    def adjoint_blocks(self, span: Span) -> Iterator[KVBlock]:
        spans, values, sums = self._spans(span), (self._k, self._v), (self._dk, self._dv)
        self._announce((stored, part) for part in spans for stored in (values + sums if part in self._summed else values))
        for part in spans:
            k_BSKD, v_BSKD = self.written(part)
            dk, dv = self._sums(part, k_BSKD, v_BSKD)
            yield KVBlock(part, k_BSKD, v_BSKD, dk, dv)
            if part == spans[-1]:
                self._own = KVBlock(part, k_BSKD, v_BSKD, dk, dv)
            else:
                self._dk.put(part, dk)
                self._dv.put(part, dv)
                self._summed.add(part)

    def take_grad(self, span: Span, *, wide: bool = False) -> tuple[Tensor, Tensor]:
        own = self._own
        dk, dv = (x[:, span.slice(own.span.start)] for x in (own.dk_BSKD, own.dv_BSKD))
        if not wide:
            dk, dv = dk.to(own.k_BSKD.dtype), dv.to(own.v_BSKD.dtype)
        self._own = None if span.start == own.span.start else own
        self._k.store.release(self._k.name, span)
        self._v.store.release(self._v.name, span)
        return dk, dv

    def _extend_adjoints(self, span: Span) -> None:
        """Sums are made with their block."""

    def _announce(self, needs: Iterable[tuple[Stored, Span]]) -> None:
        self._k.store.prefetch(((stored.name, part) for stored, part in needs), first=True)

    def _spans(self, span: Span) -> list[Span]:
        """The blocks that the queries of `span` see; the last one as far as they see it."""
        first = bisect_right(self._starts, self.mixer.keys_for(span).start) - 1
        starts = [start for start in self._starts[first:] if start < span.stop]
        return [Span(a, b) for a, b in pairwise((*starts, span.stop))]

    def _sums(self, part: Span, k_BSKD: Tensor, v_BSKD: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient sums of a block: the chunk's own as it stands, those of others from the store, or zeros."""
        if self._own is not None and self._own.span.start == part.start:
            return tuple(x[:, : len(part)] for x in (self._own.dk_BSKD, self._own.dv_BSKD))
        if part in self._summed:
            self._summed.remove(part)
            return self._dk.take(part), self._dv.take(part)
        wide = self._spec.adjoint_dtype
        return torch.zeros_like(k_BSKD, dtype=wide), torch.zeros_like(v_BSKD, dtype=wide)


def in_blocks(carry, chunks: int | None, stored: NewStored):
    """`carry`; where the plan has blocks, of so many chunks, and a chunk may see the whole sequence, one that holds its keys and values in
    them."""
    if chunks is None:
        return carry
    if hasattr(carry, "in_blocks"):  # over ranks: what each of them holds
        return carry.in_blocks(chunks, stored)
    return BlockKVCarry(carry.mixer, carry.spans, chunks, stored) if type(carry) is KVCarry and not carry.slides else carry
