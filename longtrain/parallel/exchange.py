"""Exchanges of all ranks with all: from a part of the tokens to all of them with a share of what stands along axis 2 (heads, channels),
and back.

`Rounds` cuts a rank's share into rounds. All of them are on their way while the first is worked on, and what was made of one goes back
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

InRound = Callable[[int, int], slice]
"""The same, of a rank in a round."""

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

    @property
    def size(self) -> int:
        """Of axis 2."""
        return self.count * self.width

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


@dataclass(frozen=True, slots=True)
class Rounds:
    """Exchanges in `count` rounds between `ranks`, each of which holds some `spans` of the tokens."""

    ranks: Ranks
    spans: Sequence[Spans]
    count: int

    def start(self, what: str, inputs: Sequence[tuple[Tensor, InRound]]) -> list[Arrived]:
        """Send off ``[B, tokens of this rank, X, ...]`` of all rounds."""
        of_round = lambda r: [(x, partial(share, round=r)) for x, share in inputs]
        return [to_shares(self.ranks, self.spans, what, of_round(r)) for r in range(self.count)]

    def finish(
        self, coming: Sequence[list[Arrived]], work: Callable[..., Sequence[Tensor]], what: str,
        outputs: Sequence[tuple[InRound, int]], summed: Sequence[int] = (),
    ) -> list[Tensor]:
        """What ``work(round, *shares)`` makes of what comes, of this rank's tokens. It is given shares with all tokens, and gives one
        tensor for each of `outputs`: what axis 2 of it is in a round, and how long that axis is as a whole. `summed`: see `to_tokens`."""
        going, wholes, held = [], [], total(self.spans[self.ranks.rank])
        for r in range(self.count):
            made = work(r, *(x for arriving in coming for x in arriving.pop(0)()))
            going.append(
                to_tokens(
                    self.ranks, self.spans, what, [(x, partial(share, round=r)) for x, (share, _) in zip(made, outputs, strict=True)],
                    summed=summed,
                )
            )  # fmt: skip
            if not wholes:
                shapes = [(x.shape[0], held, size, *x.shape[3:]) for x, (_, size) in zip(made, outputs, strict=True)]
                wholes = [(x.new_zeros if i in summed else x.new_empty)(shapes[i]) for i, x in enumerate(made)]
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
