"""The carry of attention whose heads are dealt to ranks: an exchange brings a chunk's tokens, spread over the ranks, to all of its tokens
with a rank's heads (`alltoall.py`).

A chunk goes there and back in parts, runs of its positions that each rank holds some of (all of the same size, where it is striped). All
parts are on their way while the first is worked on, and what was made of one goes back while the next is worked on, so that of n parts
1 / n of the transfer is waited for. Queries that are needed in the backward pass leave with the chunk's replay, keys that are restored
while the next chunk's are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtrain.parallel.alltoall import Heads
from longtrain.parallel.exchange import Arrived
from longtrain.parallel.layout import Shards, total
from longtrain.parallel.pieces import Spans
from longtrain.parallel.ranks import Ranks
from longtrain.parallel.way import delta_of
from longtrain.span import Span
from longtrain.stream.carry import kv_carry_spec
from longtrain.stream.kv_blocks import NewStored, in_blocks
from longtrain.stream.protocol import Carry, CarrySpec, KVBlock

MakeCarry = Callable[..., Carry]
"""``make(mixer, spans)``: the carry of a run of heads over a group's tokens."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some tokens of a chunk."""

    span: Span
    """Where they stand for the inner carry."""
    held: tuple[Spans, ...]
    """What each rank holds of them."""
    rows: slice
    """Where this rank's stand among those that it holds of the chunk."""


def parts_of(held: tuple[Spans, ...], at: Span, rank: int, count: int) -> list[Part]:
    """A chunk of which each rank holds `held`, and which is at `at` for the inner carry, in `count` parts."""
    parts, first = [], 0
    for part in at.split(*(at.start + i * len(at) // count for i in range(1, count))):
        spans = held if count == 1 else tuple(tuple(s for span in of_rank if len(s := span & part)) for of_rank in held)
        mine = total(spans[rank])
        parts.append(Part(part, spans, slice(first, first + mine)))
        first += mine
    return parts


class ByHeads:
    """Keys and values by heads. `shards`: what each rank of the group holds of the group's tokens; the inner carry has them in order.

    A chunk goes in `parts`; one, where the inner carry takes only whole chunks.
    """

    hands_over = False
    """What it was given is not what its inner carries hold."""
    keeps = False
    """Its inner carries live from the forward to the backward pass (`in_blocks`): no keys travel again."""

    def __init__(
        self, mixer, ranks: Ranks, shards: Shards, inner_spans: Sequence[Span], make_inner: MakeCarry, heads: Heads, parts: int
    ) -> None:
        self._ranks, self._shards, self._heads = ranks, shards, heads
        self._local, self._inner_spans = shards.local_chunks(ranks.rank), list(inner_spans)
        self._chunk_of = {span.stop: i for i, span in enumerate(self._local)}
        self._runs = heads.runs(ranks.rank)
        self._inner = [make_inner(mixer.from_head(first), self._inner_spans) for first, _, _ in self._runs]
        self._parts = self._in_parts(1 if self.slides else parts)
        self._spec: CarrySpec | None = None
        self._dtype: torch.dtype | None = None
        self._fresh: tuple[Span, Tensor, Tensor] | None = None
        """Keys that were appended and have not left yet: they go with their queries."""
        self._under_way: tuple[Span, Arrived] | None = None
        """Keys of a whole chunk that have left without queries."""
        self._queries: tuple[Span, list[Arrived]] | None = None
        """Queries that left when their chunk was replayed."""
        self._grads: list[Arrived] = []
        """Gradients of a chunk's keys on their way home, by part, the last first."""

    def in_blocks(self, chunks: int, stored: NewStored) -> ByHeads:
        """Keys and values of this rank's heads in the token store, as `longtrain.stream.kv_blocks`. A chunk is one part then: each part
        would bring all blocks again."""
        self._inner = [
            in_blocks(inner, chunks, lambda name, tokens, first=first, **of: stored(f"{name}, heads from {first}", tokens, **of))
            for inner, (first, _, _) in zip(self._inner, self._runs, strict=True)
        ]
        if getattr(self._inner[0], "keeps", False):
            self.keeps, self._parts = True, self._in_parts(1)
        return self

    def _in_parts(self, count: int) -> list[list[Part]]:
        """Of each chunk."""
        return [parts_of(held, at, self._ranks.rank, count) for held, at in zip(self._shards.parts, self._inner_spans, strict=True)]

    @property
    def slides(self) -> bool:
        return getattr(self._inner[0], "slides", False)

    @property
    def spec(self) -> CarrySpec:
        return self._spec

    def append(self, span: Span, k_BCKD: Tensor, v_BCKD: Tensor) -> None:
        self._note(k_BCKD, v_BCKD)
        self._take_in()
        self._send_off()
        self._fresh = span, k_BCKD, v_BCKD

    def prepend(self, span: Span, k_BCKD: Tensor, v_BCKD: Tensor, *, queries: Span) -> None:
        self._note(k_BCKD, v_BCKD)
        k, v = self._keys_to_heads(span, k_BCKD, v_BCKD)()
        for inner, (_, _, of_k) in zip(self._inner, self._runs, strict=True):
            inner.prepend(self._at(span), k[:, :, of_k], v[:, :, of_k], queries=self._at(queries))

    def first_needed(self, span: Span) -> int:
        starts = {inner.start: local.start for inner, local in zip(self._inner_spans, self._local, strict=True)}
        return starts[self._inner[0].first_needed(self._at(span))]

    def blocks(self, span: Span) -> list[KVBlock]:
        self._settle()
        return [block for inner in self._inner for block in inner.blocks(self._at(span))]

    def mix(self, span: Span, q_BCHD: Tensor, stored: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        parts = self._parts[self._chunk_of[span.stop]]
        if stored is not None:
            self._take_in()
            self._send_off()
            self._queries = span, self._start(parts[::-1], "q", (q_BCHD,))
            return stored
        keys: tuple[Tensor, ...] = ()
        if self._fresh is not None and self._fresh[0] == span:
            (_, *keys), self._fresh = self._fresh, None
        self._settle()
        coming, going = self._start(parts, "qkv" if keys else "q", (q_BCHD,), keys), []
        for part in parts:
            q, *kv = coming.pop(0)()
            made = []
            for inner, (_, of_q, of_k) in zip(self._inner, self._runs, strict=True):
                if kv:
                    inner.append(part.span, *(x[:, :, of_k] for x in kv))
                made.append(inner.mix(part.span, q[:, :, of_q], None))
            out, lse = (torch.cat(x, dim=2) for x in zip(*made, strict=True))
            going.append(self._heads.to_tokens(self._ranks, part.held, "out", (out, lse)))
        outs, lses = zip(*(arriving() for arriving in going), strict=True)
        return torch.cat(outs, dim=1), torch.cat(lses, dim=1)

    def mix_vjp(self, span: Span, q_BCHD: Tensor, out_BCHD: Tensor, lse_BCH: Tensor, dout_BCHD: Tensor) -> Tensor:
        self._settle()
        parts, delta_BCH = self._parts[self._chunk_of[span.stop]][::-1], delta_of(dout_BCHD, out_BCHD, lse_BCH)
        (of, queries), self._queries = self._queries or (None, []), None
        if of != span:
            queries = self._start(parts, "q", (q_BCHD,))
        coming, dqs = self._start(parts, "dout", (dout_BCHD, lse_BCH, delta_BCH)), []
        for part in parts:
            (q,), (dout, lse, delta) = queries.pop(0)(), coming.pop(0)()
            made = []
            for inner, (_, of_q, _) in zip(self._inner, self._runs, strict=True):
                dq = inner.mix_vjp(part.span, q[:, :, of_q], None, lse[:, :, of_q], dout[:, :, of_q], delta[:, :, of_q])
                made.append((dq, *inner.take_grad(part.span, wide=self._heads.replicated)))
            dq, dk, dv = (torch.cat(x, dim=2) for x in zip(*made, strict=True))
            dqs.append(self._heads.to_tokens(self._ranks, part.held, "dq", (dq,)))
            self._grads.append(self._heads.to_tokens(self._ranks, part.held, "dkv", (), (dk, dv)))
        return torch.cat([dq for (dq,) in (arriving() for arriving in reversed(dqs))], dim=1)

    def take_grad(self, span: Span) -> tuple[Tensor, Tensor]:
        grads, self._grads = [arriving() for arriving in reversed(self._grads)], []
        dk, dv = (torch.cat(x, dim=1) for x in zip(*grads, strict=True))
        return dk.to(self._dtype), dv.to(self._dtype)

    def _at(self, span: Span) -> Span:
        return self._inner_spans[self._chunk_of[span.stop]]

    def _note(self, k: Tensor, v: Tensor) -> None:
        of_keys, self._dtype = self._heads.of_keys(self._ranks.rank), k.dtype
        self._spec = kv_carry_spec(of_keys.stop - of_keys.start, k.shape[3], v.shape[3], k.dtype)

    def _start(
        self, parts: Sequence[Part], what: str, queries: Sequence[Tensor], keys: Sequence[Tensor] = ()
    ) -> list[Arrived]:
        """Send off a chunk's tensors, part by part."""
        cut = lambda tensors, part: [x[:, part.rows] for x in tensors]
        return [self._heads.to_heads(self._ranks, part.held, what, cut(queries, part), cut(keys, part)) for part in parts]

    def _keys_to_heads(self, span: Span, k: Tensor, v: Tensor) -> Arrived:
        return self._heads.to_heads(self._ranks, self._shards.parts[self._chunk_of[span.stop]], "kv", (), (k, v))

    def _send_off(self) -> None:
        if self._fresh is not None:
            (span, *keys), self._fresh = self._fresh, None
            self._under_way = span, self._keys_to_heads(span, *keys)

    def _take_in(self) -> None:
        if self._under_way is not None:
            (span, arriving), self._under_way = self._under_way, None
            k, v = arriving()
            for inner, (_, _, of_k) in zip(self._inner, self._runs, strict=True):
                inner.append(self._at(span), k[:, :, of_k], v[:, :, of_k])

    def _settle(self) -> None:
        """Have all keys that were appended."""
        self._take_in()
        self._send_off()
        self._take_in()
