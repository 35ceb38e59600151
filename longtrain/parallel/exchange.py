"""Exchanges of all ranks with all: from a part of the tokens to all of them with a share of what stands along axis 2 (heads, channels),
and back.

`through` cuts a rank's share into rounds. All of them are on their way while the first is worked on, and what was made of one goes back
while the next is worked on: of n equal rounds only the first one's way there and the last one's way back are waited for, 1 / n of all.
With X elements a token dealt to P ranks, a rank receives X b (N / P) (P - 1) / P each way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from longtrain.parallel.layout import total
from longtrain.parallel.pieces import Spans
from longtrain.parallel.ranks import Ranks

ROUNDS = 8
"""At most: an exchange of few bytes costs as much as one of none."""

LEAST = 512
"""Tokens of a chunk that go in one exchange of heads at least, when their number is chosen here: attention works worse on fewer."""

Share = Callable[[int], slice]
"""What a rank gets of axis 2."""

Arrived = Callable[[], list[Tensor]]
"""Waits for tensors."""


@dataclass(frozen=True, slots=True)
class Dealt:
    """`count` things along axis 2, each `width` wide: every rank gets a run of them, as even as can be, in `rounds`."""

    count: int
    ranks: int
    width: int = 1

    @property
    def rounds(self) -> int:
        return max(1, min(ROUNDS, self.count // self.ranks))

    def of(self, rank: int, round: int | None = None) -> slice:
        """A rank's run, or what of it belongs to a round."""
        start, stop = self.count * rank // self.ranks, self.count * (rank + 1) // self.ranks
        if round is not None:
            start, stop = (start + (stop - start) * edge // self.rounds for edge in (round, round + 1))
        return slice(start * self.width, stop * self.width)


def to_shares(ranks: Ranks, spans: Sequence[Spans], what: str, tensors: Sequence[tuple[Tensor, Share]]) -> Arrived:
    """Start ``[B, tokens of this rank, X, ...]`` -> ``[B, tokens of all, its share of X, ...]``, tokens in the order of positions.

    `spans`: what each rank holds.
    """
    sends = [[x[:, :, share(peer)] for x, share in tensors] for peer in range(ranks.size)]
    shapes = [[torch.Size((x.shape[0], total(held), *x.shape[2:])) for x in sends[ranks.rank]] for held in spans]
    arriving = ranks.all_to_all(what, sends, shapes)
    return lambda: [_in_order(spans, parts) for parts in zip(*arriving(), strict=True)]


def to_tokens(
    ranks: Ranks, spans: Sequence[Spans], what: str, tensors: Sequence[tuple[Tensor, Share]], *, summed: Sequence[int] = ()
) -> Callable[[Sequence[Tensor]], None]:
    """Start the way back. What is returned waits, and writes the shares of all ranks to their places in whole tensors, or adds them to
    those of number `summed`, in the order of ranks."""
    sends = [[torch.cat([x[:, :0], *(x[:, rows] for rows in of_rank)], dim=1) for x, _ in tensors] for of_rank in _rows(spans)]
    shapes = [
        [torch.Size((*x.shape[:2], _length(share(peer)), *x.shape[3:])) for x, (_, share) in zip(sends[ranks.rank], tensors, strict=True)]
        for peer in range(ranks.size)
    ]
    arriving = ranks.all_to_all(what, sends, shapes)

    def write(wholes: Sequence[Tensor]) -> None:
        for peer, of_peer in enumerate(arriving()):
            for i, (x, (_, share), whole) in enumerate(zip(of_peer, tensors, wholes, strict=True)):
                if i in summed:
                    whole[:, :, share(peer)] += x
                else:
                    whole[:, :, share(peer)] = x

    return write


def through(
    ranks: Ranks, spans: Sequence[Spans], dealt: Dealt, inputs: Sequence[Tensor], work: Callable[..., Sequence[Tensor]],
    what: tuple[str, str],
) -> list[Tensor]:
    """What ``work(round, *shares)`` makes of `inputs`, ``[B, tokens, X, ...]`` of this rank's tokens; each is given a share with all
    tokens and gives tensors whose axis 2 is that share."""
    shares = [partial(dealt.of, round=r) for r in range(dealt.rounds)]
    coming = [to_shares(ranks, spans, what[0], [(x, share) for x in inputs]) for share in shares]
    going, wholes = [], []
    for r, share in enumerate(shares):
        made = work(r, *coming.pop(0)())
        going.append(to_tokens(ranks, spans, what[1], [(x, share) for x in made]))
        if not wholes:
            held = total(spans[ranks.rank])
            wholes = [x.new_empty(x.shape[0], held, dealt.count * dealt.width, *x.shape[3:]) for x in made]
    for write in going:
        write(wholes)
    return wholes


def _rows(spans: Sequence[Spans]) -> list[list[slice]]:
    """For each rank, where its spans stand among those of all, in the order of positions."""
    rows: list[list[slice]] = [[] for _ in spans]
    at = 0
    for span, rank in sorted((span, rank) for rank, held in enumerate(spans) for span in held):
        rows[rank].append(slice(at, at + len(span)))
        at += len(span)
    return rows


def _in_order(spans: Sequence[Spans], parts: Sequence[Tensor]) -> Tensor:
    whole = parts[0].new_empty(parts[0].shape[0], sum(map(total, spans)), *parts[0].shape[2:])
    for of_rank, part in zip(_rows(spans), parts, strict=True):
        at = 0
        for rows in of_rank:
            whole[:, rows] = part[:, at : at + _length(rows)]
            at += _length(rows)
    return whole


def _length(part: slice) -> int:
    return part.stop - part.start
