"""Streaming over ranks: each chunk is spread over all of them, and these carries bring a chunk's queries together with the keys they see.

    ByHeads        an all-to-all a chunk: a rank carries the keys of all the group's tokens, for its heads (`by_heads.py`)
    QueriesTravel  keys stay where they were made, a chunk's queries go round (`travelling.py`)
    Halo           keys stay, and a chunk fetches those of other ranks that its windows reach

A rank runs the engine on the tokens it holds, so spans are local; the positions of a chunk are `Shards.parts`. Which operations are done,
and in what order, depends on plan, layout and mask alone, so all ranks meet in the same collectives.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from operator import attrgetter

from torch import Tensor

from longtrain.parallel.circulate import buffers
from longtrain.parallel.layout import Shards, total
from longtrain.parallel.pieces import Spans, attend, attend_vjp, cut, empty, places, seen_by_any, wide_zeros
from longtrain.parallel.ranks import Message, Pending, Ranks
from longtrain.parallel.travelling import Held, TravellingQueries
from longtrain.parallel.way import delta_of
from longtrain.span import Span
from longtrain.stream.carry import kv_carry_spec
from longtrain.stream.kv_blocks import BlockKVCarry, NewStored
from longtrain.stream.protocol import CarrySpec, KVBlock


class Staying:
    """Keys and values of the tokens that this rank holds, and their gradient sums, each in one buffer."""

    def __init__(self, mixer, ranks: Ranks, shards: Shards) -> None:
        self.mixer, self.ranks, self.shards = mixer, ranks, shards
        self._tokens = shards.length(ranks.rank)
        self._local = shards.local_chunks(ranks.rank)
        self._starts = [span.start for span in self._local]
        self._chunk_of = {span.stop: i for i, span in enumerate(self._local)}
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    @property
    def spec(self) -> CarrySpec:
        return kv_carry_spec(self._k.shape[2], self._k.shape[3], self._v.shape[3], self._k.dtype)

    def append(self, span: Span, k_BCKD: Tensor, v_BCKD: Tensor) -> None:
        if len(span) == self._tokens:
            self._k, self._v = k_BCKD, v_BCKD
            return
        if self._k is None:
            self._k, self._v = (x.new_empty(x.shape[0], self._tokens, *x.shape[2:]) for x in (k_BCKD, v_BCKD))
        self._k[:, span.slice()], self._v[:, span.slice()] = k_BCKD, v_BCKD

    def written(self, span: Span) -> tuple[Tensor, Tensor]:
        return self._k[:, span.slice()], self._v[:, span.slice()]

    @cached_property
    def _adjoints(self) -> tuple[Tensor, Tensor]:
        return wide_zeros(self._k), wide_zeros(self._v)

    def take_grad(self, span: Span, *, wide: bool = False) -> tuple[Tensor, Tensor]:
        dk, dv = (x[:, span.slice()] for x in self._adjoints)
        return (dk, dv) if wide else (dk.to(self._k.dtype), dv.to(self._v.dtype))

    def keys_for(self, span: Span) -> Span:
        """What a chunk may see of the keys that are here, by their places here."""
        return Span(self._local[self._first_chunk(span)].start, span.stop)

    def _first_chunk(self, span: Span) -> int:
        """The first of which the queries of a chunk see anything."""
        start = self.mixer.keys_for(self.shards.chunks[self._chunk_of[span.stop]]).start
        return bisect_right(self.shards.chunks, start, key=attrgetter("start")) - 1

    def _queries(self, span: Span) -> tuple[Spans, ...]:
        """The positions of the chunk, for each rank."""
        return self.shards.parts[self._chunk_of[span.stop]]

    def _keys(self, span: Span) -> tuple[tuple[Spans, ...], slice]:
        """The positions of the keys that the chunk may see, whole chunks of them, of each rank; and where this one's are in its buffers."""
        parts = self.shards.parts[self._first_chunk(span) : self._chunk_of[span.stop] + 1]
        keys = tuple(tuple(chain.from_iterable(part[rank] for part in parts)) for rank in range(self.ranks.size))
        return keys, slice(span.stop - total(keys[self.ranks.rank]), span.stop)


class QueriesTravel(Staying):
    """Keys stay; a chunk's queries visit every rank that holds keys for them, and their gradients too.

    Where the plan has blocks, this rank's keys lie in the token store, and every visit meets one block after the other.
    """

    _kept: BlockKVCarry | None = None

    @property
    def keeps(self) -> bool:
        return self._kept is not None

    def in_blocks(self, chunks: int, stored: NewStored) -> QueriesTravel:
        first, last = self.shards.chunks[0], self.shards.chunks[-1]
        if self.mixer.keys_for(last).start < first.stop:  # a chunk sees the whole sequence
            here = Staying(self.mixer, self.ranks, self.shards)  # not this carry: extents in a cycle would outlive a step that failed
            self._kept = BlockKVCarry(here, self._local, chunks, stored)
        return self

    @property
    def spec(self) -> CarrySpec:
        return super().spec if self._kept is None else self._kept.spec

    def append(self, span: Span, k_BCKD: Tensor, v_BCKD: Tensor) -> None:
        self._value_dim = v_BCKD.shape[3]
        (super() if self._kept is None else self._kept).append(span, k_BCKD, v_BCKD)

    def take_grad(self, span: Span, *, wide: bool = False) -> tuple[Tensor, Tensor]:
        return super().take_grad(span, wide=wide) if self._kept is None else self._kept.take_grad(span, wide=wide)

    def mix(self, span: Span, q_BCHD: Tensor, stored: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        if stored is not None:
            return stored
        return self._way(span).attend_blocks(self.mixer, q_BCHD, self._value_dim, partial(self._held, span))

    def mix_vjp(
        self, span: Span, q_BCHD: Tensor, out_BCHD: Tensor | None, lse_BCH: Tensor, dout_BCHD: Tensor, delta_BCH: Tensor | None = None
    ) -> Tensor:
        delta = delta_of(dout_BCHD, out_BCHD, lse_BCH) if delta_BCH is None else delta_BCH
        blocks = partial(self._held, span, adjoints=True)
        return self._way(span).add_vjp(self.mixer, dout_BCHD, q_BCHD, lse_BCH, delta, blocks).to(q_BCHD.dtype)

    def blocks(self, span: Span) -> list[KVBlock]:
        """This rank's; the others' are with them."""
        return [
            KVBlock(piece, held.k[:, rows], held.v[:, rows])
            for held in self._held(span)
            for piece, rows in zip(held.keys, places(held.keys, held.keys), strict=True)
        ]

    def _held(self, span: Span, *, adjoints: bool = False) -> Iterator[Held]:
        """What the queries of a chunk, of whatever rank, meet here."""
        if self._kept is None:
            (keys, at), tensors = self._keys(span), (self._k, self._v, *(self._adjoints if adjoints else ()))
            yield Held(keys[self.ranks.rank], *(x[:, at] for x in tensors))
            return
        for block in (self._kept.adjoint_blocks if adjoints else self._kept.blocks)(span):
            first, last = bisect_right(self._starts, block.span.start) - 1, self._chunk_of[block.span.stop]
            keys = chain.from_iterable(part[self.ranks.rank] for part in self.shards.parts[first : last + 1])
            own = block.span.stop == span.stop
            yield Held(tuple(keys), block.k_BSKD, block.v_BSKD, block.dk_BSKD, block.dv_BSKD, own)

    def _way(self, span: Span) -> TravellingQueries:
        return TravellingQueries(self.ranks, self._queries(span), self._keys(span)[0])


@dataclass(frozen=True, slots=True)
class Fetched:
    """Keys and values of other ranks on their way to a chunk, one message of each; or there."""

    span: Span
    pending: Pending
    wanted: dict[int, Spans]

    def wait(self) -> list[tuple[int, Spans, Tensor, Tensor]]:
        """(owner, positions, keys, values), in the order of ranks."""
        self.pending.wait()
        return [(m.peer, self.wanted[m.peer], *m.tensors) for m in self.pending.received if total(self.wanted[m.peer])]


class Halo(Staying):
    """Keys stay; a chunk is sent those of other ranks that it sees. For windows shorter than a chunk.

    While they are on their way a rank works on its own keys; in the backward pass they leave with the chunk's replay, and their gradients
    go home while those of one's own are made.
    """

    def __init__(self, mixer, ranks: Ranks, shards: Shards) -> None:
        super().__init__(mixer, ranks, shards)
        self._fetched: Fetched | None = None
        """For the chunk that was mixed last."""

    def mix(self, span: Span, q_BCHD: Tensor, stored: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        self._fetched = self._fetch(span)
        if stored is not None:
            return stored
        queries, (out, lse) = self._queries(span)[self.ranks.rank], empty(q_BCHD, self._v)
        attend(self.mixer, q_BCHD, queries, *self._own(span), out, lse, with_sinks=True, fresh=True)
        for _, keys, k, v in self._fetched.wait():
            attend(self.mixer, q_BCHD, queries, k, v, keys, out, lse, with_sinks=False, fresh=False)
        return out.to(q_BCHD.dtype), lse

    def mix_vjp(
        self, span: Span, q_BCHD: Tensor, out_BCHD: Tensor | None, lse_BCH: Tensor, dout_BCHD: Tensor, delta_BCH: Tensor | None = None
    ) -> Tensor:
        dq, made, (_, held) = wide_zeros(q_BCHD), [], self._keys(span)
        add = partial(
            attend_vjp, self.mixer, dout_BCHD, q_BCHD, out_BCHD, lse_BCH, self._queries(span)[self.ranks.rank], dq=dq, delta=delta_BCH
        )
        fetched, self._fetched = self._fetched, None
        for owner, keys, k, v in (self._fetch(span) if fetched is None or fetched.span != span else fetched).wait():
            dk, dv = map(wide_zeros, (k, v))
            add(k, v, keys, dk=dk, dv=dv, with_sinks=False)
            made.append(Message("dkv", owner, (dk, dv)))
        arrive = self._send_home(span, made)
        dk, dv = (x[:, held] for x in self._adjoints)
        add(*self._own(span), dk=dk, dv=dv, with_sinks=True)
        arrive()
        return dq.to(q_BCHD.dtype)

    def blocks(self, span: Span) -> list[KVBlock]:
        """Those of this rank, then those sent by the others, in the order of ranks."""
        of_others = [(k, v, keys) for _, keys, k, v in self._fetch(span).wait()]
        return [
            KVBlock(piece, k[:, rows], v[:, rows])
            for k, v, keys in (self._own(span), *of_others)
            for piece, rows in zip(keys, places(keys, keys), strict=True)
            if len(piece)
        ]

    def _own(self, span: Span) -> tuple[Tensor, Tensor, Spans]:
        """This rank's keys, values and their positions."""
        keys, held = self._keys(span)
        return self._k[:, held], self._v[:, held], keys[self.ranks.rank]

    def _fetch(self, span: Span) -> Fetched:
        """Send for the keys that the chunk sees on other ranks, and send them this one's."""
        me, (keys, _), (k, v, _) = self.ranks.rank, self._keys(span), self._own(span)
        sends, receives, wanted = [], [], {}
        for peer in self._others:
            asked, wanted[peer] = self._wanted(span, peer, keys[me]), self._wanted(span, me, keys[peer])
            sends.append(Message("kv", peer, tuple(cut(x, keys[me], asked).contiguous() for x in (k, v))))
            receives.append(Message("kv", peer, buffers((k, v), wanted[peer])))
        return Fetched(span, self.ranks.exchange(sends, receives), wanted)

    def _send_home(self, span: Span, made: Sequence[Message]) -> Callable[[], None]:
        """Send off what was made of other ranks' keys. What is returned waits for what they made of this one's, and adds it, in the order
        of ranks."""
        keys, held = self._keys(span)
        mine = keys[self.ranks.rank]
        wanted = {peer: self._wanted(span, peer, mine) for peer in self._others}
        receives = [Message("dkv", peer, buffers(self._adjoints, wanted[peer])) for peer in self._others if total(wanted[peer])]
        pending = self.ranks.exchange(made, receives)

        def arrive() -> None:
            pending.wait()
            for message in receives:
                for adjoint, part in zip(self._adjoints, message.tensors, strict=True):
                    of_mine, at = adjoint[:, held], 0
                    for rows in places(mine, wanted[message.peer]):
                        of_mine[:, rows] += part[:, at : at + rows.stop - rows.start]
                        at += rows.stop - rows.start

        return arrive

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.ranks.size) if rank != self.ranks.rank]

    def _wanted(self, span: Span, by: int, keys: Spans) -> Spans:
        """What the chunk's queries of rank `by` see of `keys`."""
        return seen_by_any(self.mixer, self._queries(span)[by], keys)
