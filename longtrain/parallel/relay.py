"""A state that is handed along the ranks: which rank has its turn when, and what is on its way.

Runs of tokens follow each other from rank to rank, forward from the first token to the last and backward the other way. A state travels in
blocks, and a rank hands on each as soon as it has it; what it does for a block that others do not wait for comes after that.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longtrain.parallel.layout import Shards
from longtrain.parallel.ranks import Message, Pending, Ranks
from longtrain.span import Span


@dataclass(frozen=True, slots=True)
class Leg:
    """A run of tokens that a rank holds of a chunk, which ranks hold what comes before and what comes behind (None: nothing does), and how
    many runs of the chunk the state has come by then."""

    span: Span
    source: int | None
    target: int | None
    hops: int


@dataclass(frozen=True, slots=True)
class Stage:
    """What a rank has to do with the state in one chunk, in the order in which the state comes by."""

    legs: tuple[Leg, ...]
    heir_of: int | None
    """The rank that hands this one the state with which the next chunk begins; None where another rank needs it, or nobody does."""

    def split(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """The tensors of each leg, of those of a chunk, which are in the order of positions."""
        return list(zip(*(x.split([len(leg.span) for leg in self.legs], dim=1) for x in tensors), strict=True))


def stages(shards: Shards, rank: int, *, backward: bool = False) -> list[Stage]:
    """Of each chunk, for `rank`; `backward`: from the last token to the first, legs within a chunk too."""
    chain = shards.pieces[::-1] if backward else shards.pieces
    ends = (None, None, None)
    found, come_by = {chunk: ([], None) for chunk in range(len(shards.chunks))}, Counter()
    for (_, before, _), (chunk, owner, span), (chunk_behind, behind, _) in zip((ends, *chain), chain, (*chain[1:], ends), strict=False):
        legs, heir_of = found[chunk]
        if owner == rank:
            legs.append(Leg(span, before, behind, come_by[chunk]))
        elif behind == rank and chunk_behind != chunk:
            found[chunk] = legs, owner
        come_by[chunk] += 1
    return [Stage(tuple(legs), heir_of) for legs, heir_of in found.values()]


def hand_overs(shards: Shards) -> int:
    """How often the state goes from one rank to another."""
    owners = [owner for _, owner, _ in shards.pieces]
    return sum(a != b for a, b in zip(owners, owners[1:], strict=False))


Step = Callable[[int, int, Tensor], Tensor]
OnBlock = Callable[[int, int], None]


def _nothing(leg: int, block: int) -> None: ...


class Relay:
    """States, or their adjoints, on their way along the legs of one rank. All that is sent in a chunk is received in it."""

    def __init__(self, ranks: Ranks, what: str) -> None:
        self._ranks, self._what = ranks, what
        self._own = deque[Tensor]()
        """The blocks behind a leg, where the next one is this rank's too."""
        self._coming = deque[Pending]()
        """Blocks that other ranks send."""

    def run(
        self, stage: Stage, blocks: Sequence[Any], like: Tensor, step: Step, *, ready: OnBlock = _nothing, done: OnBlock = _nothing
    ) -> None:
        """``behind = step(leg, block, before)`` for every block of every leg, in this order; `blocks` are indices into a state like `like`.

        At the end of the sequence, where there is nothing before, that is a state of zeros. ``ready(leg, block)`` is called before, so
        many blocks ahead as the state has come by ranks; ``done(leg, block)`` when it was sent.
        """
        sent, order, prepared = [], [(i, b) for i in range(len(stage.legs)) for b in range(len(blocks))], 0
        others = [leg.source for leg in stage.legs if leg.source not in (None, self._ranks.rank)]
        for source in others[len(self._coming) // len(blocks) :]:  # what the chunk begins with was asked for in the one before
            self._ask(source, blocks, like)
        for at, (i, b) in enumerate(order):
            leg = stage.legs[i]
            while prepared < min(len(order), at + 1 + min(leg.hops, len(blocks))):
                ready(*order[prepared])
                prepared += 1
            if leg.source is None:
                before = torch.zeros_like(like[blocks[b]])
            elif leg.source == self._ranks.rank:
                before = self._own.popleft()
            else:
                (before,) = self._coming.popleft().wait()[self._what]
            behind = step(i, b, before).contiguous()
            if leg.target == self._ranks.rank:
                self._own.append(behind)
            elif leg.target is not None:
                sent.append(self._ranks.exchange([Message(self._what, leg.target, (behind,))], []))
            done(i, b)
        if stage.heir_of is not None:
            self._ask(stage.heir_of, blocks, like)
        for pending in sent:
            pending.wait()

    def _ask(self, source: int, blocks: Sequence[Any], like: Tensor) -> None:
        for block in blocks:
            buffer = like.new_empty(like[block].shape)
            self._coming.append(self._ranks.exchange([], [Message(self._what, source, (buffer,))]))


@dataclass(frozen=True, slots=True)
class Known:
    """In place of a relay, where the states before a rank's legs are known: the same steps on the same numbers."""

    entries: Sequence[Tensor]

    def run(
        self, stage: Stage, blocks: Sequence[Any], like: Tensor, step: Step, *, ready: OnBlock = _nothing, done: OnBlock = _nothing
    ) -> None:
        for i, entry in enumerate(self.entries):
            for b, block in enumerate(blocks):
                ready(i, b)
                step(i, b, entry[block])
                done(i, b)
