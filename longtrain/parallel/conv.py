"""Convolution over ranks that hold different tokens.

    halo        a causal filter of W taps, chunk by chunk: a run of tokens is given the W - 1 inputs before it, and in the backward pass
                gives their gradients back; those of its outputs that need nobody are made while they are on their way
    channels    any filter, in two passes: an all-to-all brings all tokens of a rank's channels together, and back (`exchange.py`)

Gates are token-local and stay where they are: what travels is v = gate_in u, and y. A rank receives, with E channels of b bytes (w wide),
N tokens over P ranks, and a run of tokens that somebody else holds what comes before:

    halo        forward    (W - 1) E b a run                     backward    (W - 1) E (b + w) a run
    channels    forward    2 E b  (N / P) (P - 1) / P            backward    3 E b  (N / P) (P - 1) / P, with an output gate 4 E b

Filter and skip are whole on every rank. Each makes their gradient from its tokens, or for its channels; their sum over the ranks is the
whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import accumulate

import torch
from torch import Tensor

from longtrain.ops.long_conv import long_conv, long_conv_backward
from longtrain.parallel.exchange import Dealt, Rounds
from longtrain.parallel.layout import Shards, total
from longtrain.parallel.pieces import Spans
from longtrain.parallel.ranks import Message, Pending, Ranks
from longtrain.span import Span
from longtrain.stream.protocol import CarrySpec, KVBlock
from longtrain.stream.sliding import Sliding

LONG = 4
"""A run is mixed in two calls, the one that needs others and the rest, where it is longer than so many times what a filter reaches back."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ConvByHalo:
    """A causal convolution (`longtrain.ops.mixers.LongConvMixer`) of the tokens that this rank holds, chunk by chunk."""

    base: object
    ranks: Ranks
    shards: Shards

    causal = True

    def make_carry(self, spans: Sequence[Span]) -> HaloCarry:
        return HaloCarry(self.base, self.ranks, self.shards)

    def carried(self, mix, *inputs_BTE: Tensor) -> Tensor:
        return self.base.carried(mix, *inputs_BTE)

    @property
    def shared(self) -> tuple[Tensor, ...]:
        return self.base.shared

    def with_shared(self, *shared: Tensor) -> ConvByHalo:
        return replace(self, base=self.base.with_shared(*shared))


class HaloCarry:
    """The inputs of a chunk, and of those before it that it reaches, on the ranks that hold them; `mix` takes an empty query, as in
    `longtrain.stream.conv_carry`."""

    def __init__(self, mixer, ranks: Ranks, shards: Shards) -> None:
        self.mixer, self.ranks, self.shards = mixer, ranks, shards
        self._local = shards.local_chunks(ranks.rank)
        self._chunk_of = {span.stop: i for i, span in enumerate(self._local)}
        starts = [chunk.start for chunk in shards.chunks]
        self._first = [bisect_right(starts, mixer.keys_for(chunk).start) - 1 for chunk in shards.chunks]
        tokens = self._local[-1].stop
        reach = max(chunk.stop - self._local[first].start for chunk, first in zip(self._local, self._first, strict=True))
        self.slides = reach < tokens
        self._v_BSE, self._dv_BSE = Sliding(reach, tokens), Sliding(reach, tokens)
        self._dshared = [torch.zeros_like(t, dtype=_wide(t.dtype)) for t in mixer.shared]
        held = shards.spans(ranks.rank)
        self._starts, self._places = [span.start for span in held], [0, *accumulate(map(len, held))]
        self._inputs_before: dict[Span, list[tuple[int, Span]]] = {}
        self._coming: tuple[Span, Pending] | None = None
        """What others hold of the inputs before the chunk that was mixed last."""

    @property
    def spec(self) -> CarrySpec:
        v_BSE = self._v_BSE[self._v_BSE.held]
        wide = _wide(v_BSE.dtype)
        sizes = dict(bytes_per_token=v_BSE.shape[2] * v_BSE.itemsize, adjoint_bytes_per_token=v_BSE.shape[2] * wide.itemsize)
        return CarrySpec(kind="append", tensors=("v",), adjoint_dtype=wide, **sizes)

    def append(self, span: Span, v_BCE: Tensor) -> None:
        self._v_BSE.append(span, v_BCE, needed_from=self.first_needed(span))

    def first_needed(self, span: Span) -> int:
        """Start of the first chunk that the outputs of `span` depend on, on whatever rank."""
        return self._local[self._first[self._chunk_of[span.stop]]].start

    def prepend(self, span: Span, v_BCE: Tensor, *, queries: Span) -> None:
        """Take inputs that are missing, the last ones first; those behind `queries` are done with."""
        self._v_BSE.prepend(span, v_BCE, queries.stop)

    def written(self, span: Span) -> tuple[Tensor]:
        return (self._v_BSE[span],)

    def blocks(self, span: Span) -> list[KVBlock]:
        return []

    def mix(self, span: Span, q: Tensor, stored: tuple[Tensor, None] | None) -> tuple[Tensor, None]:
        self._coming = span, self._send_for(span)
        if stored is not None:
            return stored
        outs = {}
        for keys, run, v_BSE in self._runs(span, own_first=True):
            out_BSE = long_conv(v_BSE, *self.mixer.shared, cu_seqlens=self._documents(keys), backend=self.mixer.backend)
            outs[run] = out_BSE[:, run.slice(keys.start)]
        return torch.cat([outs[run] for run in sorted(outs)], dim=1), None

    def mix_vjp(self, span: Span, q: Tensor, out: Tensor, lse: None, dout_BCE: Tensor) -> Tensor:
        held = Span(self.first_needed(span), span.stop)
        dtype = _wide(self._v_BSE[held].dtype)
        self._dv_BSE.extend(held, self._v_BSE[held], dtype)
        theirs: dict[int, list[Tensor]] = {}
        arrive = None
        for keys, run, v_BSE in self._runs(span, own_first=False):
            if arrive is None and not self._needs_others(span, run):
                arrive = self._send_home(span, theirs)
            given = (v_BSE, *self.mixer.shared)
            wide = reduce(torch.promote_types, (t.dtype for t in given), torch.float32)
            v_BSE, filter_HW, skip_E = (t.to(wide) for t in given)
            dy_BSE = torch.zeros_like(v_BSE)  # of the outputs before the run nothing is asked here
            dy_BSE[:, run.slice(keys.start)] = dout_BCE[:, self._place(run).slice(span.start)]
            dv_BSE, *dshared = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (v_BSE, filter_HW, skip_E))
            long_conv_backward(
                dy_BSE, v_BSE, filter_HW, skip_E, cu_seqlens=self._documents(keys), backend=self.mixer.backend,
                du=dv_BSE, dk=dshared[0], dskip=dshared[1],
            )  # fmt: skip
            for whole, part in zip(self._dshared, dshared, strict=True):
                whole += part
            for owner, piece in (*self._before(span, run), (self.ranks.rank, run)):
                part = dv_BSE[:, piece.slice(keys.start)]
                if owner == self.ranks.rank:
                    self._dv_BSE[self._place(piece)].add_(part)
                else:
                    theirs.setdefault(owner, []).append(part.to(dtype))
        arrive = self._send_home(span, theirs) if arrive is None else arrive
        arrive()
        return torch.zeros_like(q)

    def take_grad(self, span: Span) -> tuple[Tensor]:
        return (self._dv_BSE[span].to(self._v_BSE[span].dtype),)

    def shared_grads(self) -> list[Tensor]:
        """Gradients of the mixer's `shared` tensors by this rank's tokens, once every span has had its turn."""
        return self._dshared

    def _runs(self, span: Span, *, own_first: bool) -> Iterator[tuple[Span, Span, Tensor]]:
        """Of each run of tokens that this rank holds of a chunk: the inputs that it depends on, itself, and their values; first, or last,
        those that need nobody."""
        me, (of, pending) = self.ranks.rank, self._coming
        pending = pending if of == span else self._send_for(span)
        asked = {peer: self._asked(span, by=me, of=peer) for peer in self._others}
        arrived = {m.peer: iter(m.tensors[0].split(list(map(len, asked[m.peer])), dim=1)) for m in pending.received}
        for run in sorted(self._cut(span, me), key=partial(self._needs_others, span), reverse=not own_first):
            if self._needs_others(span, run):
                pending.wait()
            before = [self._v_BSE[self._place(piece)] if owner == me else next(arrived[owner]) for owner, piece in self._before(span, run)]
            yield self.mixer.keys_for(run), run, torch.cat([*before, self._v_BSE[self._place(run)]], dim=1)
        pending.wait()

    def _send_for(self, span: Span) -> Pending:
        me, v_BCE = self.ranks.rank, self._v_BSE[span]
        sends = [
            Message("halo", peer, (torch.cat([self._v_BSE[self._place(piece)] for piece in asked], dim=1),))
            for peer in self._others if (asked := self._asked(span, by=peer, of=me))
        ]  # fmt: skip
        receives = self._buffers("halo", v_BCE, {peer: self._asked(span, by=me, of=peer) for peer in self._others})
        return self.ranks.exchange(sends, receives)

    def _cut(self, span: Span, rank: int) -> list[Span]:
        """The runs that a rank holds of a chunk; of a long one, the tokens whose filters begin before it by themselves."""
        reach = self.mixer.filter.shape[1] - 1
        runs = self.shards.parts[self._chunk_of[span.stop]][rank]
        return [part for run in runs for part in (run.split(run.start + reach) if len(run) > LONG * reach else (run,))]

    def _needs_others(self, span: Span, run: Span) -> bool:
        return any(owner != self.ranks.rank for owner, _ in self._before(span, run))

    def _send_home(self, span: Span, theirs: dict[int, list[Tensor]]) -> Callable[[], None]:
        """Send off what was made of other ranks' inputs. What is returned waits for what they made of this one's, and adds it, in the order
        of ranks."""
        asked = {peer: self._asked(span, by=peer, of=self.ranks.rank) for peer in self._others}
        sends = [Message("dhalo", owner, (torch.cat(parts, dim=1),)) for owner, parts in sorted(theirs.items())]
        receives = self._buffers("dhalo", self._dv_BSE[span], asked)
        pending = self.ranks.exchange(sends, receives)

        def arrive() -> None:
            pending.wait()
            for message in receives:
                pieces = asked[message.peer]
                for piece, part in zip(pieces, message.tensors[0].split(list(map(len, pieces)), dim=1), strict=True):
                    self._dv_BSE[self._place(piece)].add_(part)

        return arrive

    @staticmethod
    def _buffers(what: str, like: Tensor, pieces: dict[int, Spans]) -> list[Message]:
        """For what each peer sends, if it sends something."""
        return [Message(what, peer, (like.new_empty(like.shape[0], total(of), like.shape[2]),)) for peer, of in pieces.items() if of]

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.ranks.size) if rank != self.ranks.rank]

    def _asked(self, span: Span, *, by: int, of: int) -> Spans:
        """What rank `of` holds of the inputs before the runs that rank `by` holds of a chunk, run by run."""
        return tuple(piece for run in self._cut(span, by) for owner, piece in self._before(span, run) if owner == of)

    def _before(self, span: Span, run: Span) -> list[tuple[int, Span]]:
        """The inputs before a run of a chunk on which it depends, by who holds them, in the order of positions."""
        if run not in self._inputs_before:
            chunk, before = self._chunk_of[span.stop], Span(self.mixer.keys_for(run).start, run.start)
            parts = self.shards.parts[self._first[chunk] : chunk + 1]
            found = [(s & before, owner) for part in parts for owner, held in enumerate(part) for s in held if len(s & before)]
            self._inputs_before[run] = [(owner, piece) for piece, owner in sorted(found)]
        return self._inputs_before[run]

    def _place(self, piece: Span) -> Span:
        """Where something of one span stands among the tokens that this rank holds."""
        i = bisect_right(self._starts, piece.start) - 1
        offset = self._places[i] - self._starts[i]
        return Span(piece.start + offset, piece.stop + offset)

    def _documents(self, keys: Span) -> Tensor | None:
        documents = self.mixer.documents
        return None if documents is None else torch.tensor(documents.edges_within(keys)[0], dtype=torch.int32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ConvByChannels:
    """Any convolution (`LongConvMixer`, `ButterflyMixer`) of the tokens that this rank holds, in two passes."""

    base: object
    ranks: Ranks
    shards: Shards

    causal = False
    """It needs whole sequences."""

    @property
    def shared(self) -> tuple[Tensor, ...]:
        return self.base.shared

    def with_shared(self, *shared: Tensor) -> ConvByChannels:
        return replace(self, base=self.base.with_shared(*shared))

    def by_group(self, *inputs_BTE: Tensor) -> Iterator[tuple[slice, ConvByChannels, tuple[Tensor, ...]]]:
        """All channels at once: they are cut into rounds, of which one is in flight while another is mixed."""
        yield slice(None), self, inputs_BTE

    def mix_into(self, out_BTE: Tensor, u_BTE: Tensor, gate_in_BTE: Tensor | None = None, gate_out_BTE: Tensor | None = None) -> None:
        v_BTE = u_BTE if gate_in_BTE is None else u_BTE * gate_in_BTE
        (y_BTE,) = self._through((v_BTE,), lambda _, part, v: (part(v),), ("v", "y"), 1)
        out_BTE.copy_(y_BTE if gate_out_BTE is None else y_BTE * gate_out_BTE)

    def vjp_into(self, dout_BTE: Tensor, inputs: Sequence[Tensor], dinputs: Sequence[Tensor], dshared: Sequence[Tensor]) -> None:
        """Writes the gradients of inputs and of `shared`, of these by this rank's channels."""
        u_BTE, gate_in, gate_out = (*inputs, None, None)[:3]
        v_BTE = u_BTE if gate_in is None else u_BTE * gate_in
        dy_BTE = dout_BTE if gate_out is None else dout_BTE * gate_out
        for d in dshared:
            d.zero_()

        def work(round: int, part, v: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
            dv, y = torch.empty_like(v), () if gate_out is None else (part(v),)
            if hasattr(part, "vjp_into"):
                found = [torch.empty_like(t) for t in part.shared]
                part.vjp_into(dy, (v,), (dv,), found)
            else:
                leaves = [t.detach().requires_grad_() for t in (v, *part.shared)]
                with torch.enable_grad():
                    out = part.with_shared(*leaves[1:])(leaves[0])
                dv, *found = torch.autograd.grad(out, leaves, dy)
            for d, made in zip(self._shares(dshared, round), found, strict=True):
                d += made
            return (dv, *y)

        dv_BTE, *y_BTE = self._through((v_BTE, dy_BTE), work, ("v and dy", "dv"), 1 if gate_out is None else 2)
        dinputs[0].copy_(dv_BTE if gate_in is None else dv_BTE * gate_in)
        if gate_in is not None:
            dinputs[1].copy_(dv_BTE * u_BTE)
        if gate_out is not None:
            dinputs[2].copy_(dout_BTE * y_BTE[0])

    @property
    def _dealt(self) -> Dealt:
        """Whole filters to each rank."""
        filters, channels = self.base.filter.shape[0], self.base.skip.shape[0]
        return Dealt(filters, self.ranks.size, channels // filters)

    def _shares(self, shared: Sequence[Tensor], round: int) -> list[Tensor]:
        """Of tensors like `shared`, what belongs to this rank's channels in a round; all of what is for all channels."""
        dealt = self._dealt
        channels = dealt.of(self.ranks.rank, round)
        filters = slice(channels.start // dealt.width, channels.stop // dealt.width)
        return [shared[0][filters], shared[1][channels], *shared[2:]]

    def _through(self, tensors: Sequence[Tensor], work, what: tuple[str, str], outputs: int) -> list[Tensor]:
        dealt, spans = self._dealt, tuple(self.shards.spans(rank) for rank in range(self.ranks.size))
        rounds = Rounds(self.ranks, spans, dealt.rounds)

        def of_round(round: int, *shares: Tensor) -> Sequence[Tensor]:
            with torch.no_grad():
                return work(round, self.base.with_shared(*self._shares(self.base.shared, round)), *shares)

        coming = rounds.start(what[0], [(x, dealt.of) for x in tensors])
        return rounds.finish([coming], of_round, what[1], [(dealt.of, dealt.size)] * outputs)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
