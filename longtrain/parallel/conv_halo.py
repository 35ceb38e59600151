"""Causal convolution over ranks that hold different tokens, chunk by chunk: a run of tokens is given the W - 1 inputs before it, its halo.

In the backward pass it gives their gradients back. Those of its outputs that need nobody are made while halos are on their way: last
forward, first backward. Gates are token-local and stay where they are: what travels is v = gate_in u. With E channels of b bytes (w wide),
a run of tokens that somebody else holds what comes before receives

    forward    (W - 1) E b                     backward    (W - 1) E (b + w)

Filter and skip are whole on every rank. Each makes their gradient from its tokens; their sum over the ranks is the whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from longtrain.ops.long_conv import long_conv
from longtrain.parallel.layout import Shards, total
from longtrain.parallel.pieces import Spans
from longtrain.parallel.ranks import Message, Pending, Ranks
from longtrain.span import Span
from longtrain.stream.conv_carry import ConvCarry

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


class HaloCarry(ConvCarry):
    """The inputs of a chunk, and of those before it that it reaches, on the ranks that hold them."""

    def __init__(self, mixer, ranks: Ranks, shards: Shards) -> None:
        self.ranks, self.halos = ranks, Halos(mixer, shards, ranks.rank)
        super().__init__(mixer, shards.local_chunks(ranks.rank), self.halos.first_needed)
        self._coming: tuple[Span, Pending] | None = None
        """What others hold of the inputs before the chunk that was mixed last."""

    def mix(self, span: Span, q: Tensor, stored: tuple[Tensor, None] | None) -> tuple[Tensor, None]:
        self._coming = span, self._send_for(span)
        if stored is not None:
            return stored
        outs = {}
        for keys, run, v_BSE in self._runs(span, own_first=True):
            out_BSE = long_conv(v_BSE, *self.mixer.shared, **self._options(keys))
            outs[run] = out_BSE[:, run.slice(keys.start)]
        return torch.cat([outs[run] for run in sorted(outs)], dim=1), None

    def mix_vjp(self, span: Span, q: Tensor, out: Tensor, lse: None, dout_BCE: Tensor) -> Tensor:
        held, halos = Span(self.first_needed(span), span.stop), self.halos
        dtype = self.spec.adjoint_dtype
        self._dv_BSE.extend(held, self._v_BSE[held], dtype)
        theirs: dict[int, list[Tensor]] = {}
        arrive = None
        for keys, run, v_BSE in self._runs(span, own_first=False):
            if arrive is None and not halos.needs_others(span, run):
                arrive = self._send_home(span, theirs)
            dv_BSE = self._differentiate(keys, run, v_BSE, dout_BCE[:, halos.place(run).slice(span.start)])
            for owner, piece in (*halos.before(span, run), (halos.rank, run)):
                part = dv_BSE[:, piece.slice(keys.start)]
                if owner == halos.rank:
                    self._dv_BSE[halos.place(piece)].add_(part)
                else:
                    theirs.setdefault(owner, []).append(part.to(dtype))
        arrive = self._send_home(span, theirs) if arrive is None else arrive
        arrive()
        return torch.zeros_like(q)

    def _runs(self, span: Span, *, own_first: bool) -> Iterator[tuple[Span, Span, Tensor]]:
        """Of each run of tokens that this rank holds of a chunk: the inputs that it depends on, itself, and their values; first, or last,
        those that need nobody."""
        halos, (of, pending) = self.halos, self._coming
        pending = pending if of == span else self._send_for(span)
        asked = {peer: halos.asked(span, by=halos.rank, of=peer) for peer in halos.others}
        arrived = {m.peer: iter(m.tensors[0].split(list(map(len, asked[m.peer])), dim=1)) for m in pending.received}
        for run in sorted(halos.runs(span, halos.rank), key=partial(halos.needs_others, span), reverse=not own_first):
            if halos.needs_others(span, run):
                pending.wait()
            before = [self._held(piece) if owner == halos.rank else next(arrived[owner]) for owner, piece in halos.before(span, run)]
            yield self.mixer.keys_for(run), run, torch.cat([*before, self._held(run)], dim=1)
        pending.wait()

    def _held(self, piece: Span) -> Tensor:
        return self._v_BSE[self.halos.place(piece)]

    def _send_for(self, span: Span) -> Pending:
        halos = self.halos
        sends = [
            Message("halo", peer, (torch.cat([self._held(piece) for piece in asked], dim=1),))
            for peer in halos.others if (asked := halos.asked(span, by=peer, of=halos.rank))
        ]  # fmt: skip
        asked = {peer: halos.asked(span, by=halos.rank, of=peer) for peer in halos.others}
        return self.ranks.exchange(sends, _buffers("halo", self._v_BSE[span], asked))

    def _send_home(self, span: Span, theirs: dict[int, list[Tensor]]) -> Callable[[], None]:
        """Send off what was made of other ranks' inputs. What is returned waits for what they made of this one's, and adds it, in the order
        of ranks."""
        halos = self.halos
        asked = {peer: halos.asked(span, by=peer, of=halos.rank) for peer in halos.others}
        sends = [Message("dhalo", owner, (torch.cat(parts, dim=1),)) for owner, parts in sorted(theirs.items())]
        receives = _buffers("dhalo", self._dv_BSE[span], asked)
        pending = self.ranks.exchange(sends, receives)

        def arrive() -> None:
            pending.wait()
            for message in receives:
                pieces = asked[message.peer]
                for piece, part in zip(pieces, message.tensors[0].split(list(map(len, pieces)), dim=1), strict=True):
                    self._dv_BSE[halos.place(piece)].add_(part)

        return arrive


class Halos:
    """Who holds the inputs before each run of tokens. A chunk is named by its span among the tokens that `rank` holds."""

    def __init__(self, mixer, shards: Shards, rank: int) -> None:
        self.mixer, self.shards, self.rank = mixer, shards, rank
        self.others = [other for other in range(shards.ranks) if other != rank]
        local, starts = shards.local_chunks(rank), [chunk.start for chunk in shards.chunks]
        self._chunk_of = {span.stop: i for i, span in enumerate(local)}
        self._first = [bisect_right(starts, mixer.keys_for(chunk).start) - 1 for chunk in shards.chunks]
        """The first chunk that the outputs of each depend on, on whatever rank."""
        self.first_needed = {span.stop: local[first].start for span, first in zip(local, self._first, strict=True)}
        held = shards.spans(rank)
        self._starts, self._places = [span.start for span in held], [0, *accumulate(map(len, held))]
        self._before: dict[Span, list[tuple[int, Span]]] = {}

    def runs(self, span: Span, rank: int) -> list[Span]:
        """Those that a rank holds of a chunk; of a long one, the tokens whose filters begin before it by themselves."""
        reach = self.mixer.filter.shape[1] - 1
        runs = self.shards.parts[self._chunk_of[span.stop]][rank]
        return [part for run in runs for part in (run.split(run.start + reach) if len(run) > LONG * reach else (run,))]

    def before(self, span: Span, run: Span) -> list[tuple[int, Span]]:
        """The inputs before a run of a chunk on which it depends, by who holds them, in the order of positions."""
        if run not in self._before:
            chunk, before = self._chunk_of[span.stop], Span(self.mixer.keys_for(run).start, run.start)
            parts = self.shards.parts[self._first[chunk] : chunk + 1]
            found = [(s & before, owner) for part in parts for owner, held in enumerate(part) for s in held if len(s & before)]
            self._before[run] = [(owner, piece) for piece, owner in sorted(found)]
        return self._before[run]

    def needs_others(self, span: Span, run: Span) -> bool:
        return any(owner != self.rank for owner, _ in self.before(span, run))

    def asked(self, span: Span, *, by: int, of: int) -> Spans:
        """What rank `of` holds of the inputs before the runs that rank `by` holds of a chunk, run by run."""
        return tuple(piece for run in self.runs(span, by) for owner, piece in self.before(span, run) if owner == of)

    def place(self, piece: Span) -> Span:
        """Where something of one span stands among the tokens that this rank holds."""
        i = bisect_right(self._starts, piece.start) - 1
        offset = self._places[i] - self._starts[i]
        return Span(piece.start + offset, piece.stop + offset)


def _buffers(what: str, like: Tensor, pieces: dict[int, Spans]) -> list[Message]:
    """For what each peer sends, if it sends something."""
    return [Message(what, peer, (like.new_empty(like.shape[0], total(of), like.shape[2]),)) for peer, of in pieces.items() if of]
