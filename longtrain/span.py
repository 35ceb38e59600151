"""Where tokens are: spans of positions, and the layout of one (packed) sequence.

Leaves of the import graph: data only, everything may import them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A half-open range of token positions ``[start, stop)``."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"Span needs 0 <= start <= stop, found [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    def __and__(self, other: Span) -> Span:
        """The common part, of length zero where there is none."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))

    def slice(self, origin: int = 0) -> slice:
        """As an index into a tensor whose first token is at position `origin`."""
        return slice(self.start - origin, self.stop - origin)

    def split(self, *positions: int) -> list[Span]:
        """Cut at every position that lies strictly inside."""
        cuts = sorted({p for p in positions if self.start < p < self.stop})
        edges = [self.start, *cuts, self.stop]
        return [Span(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def chunk_spans(tokens: int, chunk_tokens: int) -> list[Span]:
    """Cut ``[0, tokens)`` into chunks of `chunk_tokens`; the last one may be shorter."""
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, found {chunk_tokens}")
    return [Span(a, min(a + chunk_tokens, tokens)) for a in range(0, tokens, chunk_tokens)]


def whole_chunks(kept: Span, chunk_tokens: int) -> Span:
    """The chunks that lie within `kept`, the last tokens of a sequence."""
    return Span(min(-(-kept.start // chunk_tokens) * chunk_tokens, kept.stop), kept.stop)


@dataclass(frozen=True, slots=True)
class Layout:
    """Positions and documents of one packed sequence of `tokens` tokens, and which of them this process holds.

    `edges` are the document boundaries ``(0, ..., tokens)``; one document when there are just two. Everything that depends on
    documents (rotary positions, label shift, the first key that a query may see) is derived here, once.
    """

    tokens: int
    edges: tuple[int, ...]
    held: tuple[Span, ...] | None = None
    """The positions that this process holds, in its order (`longtrain.parallel.layout`); None: all of them."""

    @classmethod
    def make(cls, tokens: int, cu_seqlens: Tensor | Sequence[int] | None = None) -> Layout:
        """From `cu_seqlens` ``[documents + 1]``, or one document. Raises ValueError when they do not cover the tokens."""
        if cu_seqlens is None:
            return cls(tokens, (0, tokens))
        given = tuple(cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)
        edges = tuple(map(int, given))
        rises = edges == given and all(a <= b for a, b in zip(edges, edges[1:], strict=False))
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != tokens or not rises:
            shown = f"{list(given[:6])}{'...' if len(given) > 6 else ''} ending in {given[-1] if given else 'nothing'}"
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens ({tokens}) in whole numbers, found {shown}; "
                "give the cumulative document lengths, first entry 0"
            )
        return cls(tokens, edges)

    def first_visible(self, position: int) -> int:
        """The first position of the document that holds `position`."""
        return self.edges[bisect_right(self.edges, position) - 1]

    def edges_within(self, *spans: Span) -> list[tuple[int, ...]]:
        """Document boundaries relative to each span, of the documents that touch any of them: ``cu_seqlens`` for each."""
        first = min(bisect_right(self.edges, s.start) - 1 for s in spans)
        last = max(bisect_left(self.edges, s.stop) for s in spans)
        edges = self.edges[first : last + 1]
        return [tuple(min(max(e, s.start), s.stop) - s.start for e in edges) for s in spans]

    def take(self, x: Tensor, axis: int = 1) -> Tensor:
        """The tokens that this process holds, of a tensor that has all of them along `axis`."""
        return x if self.held is None else torch.cat([x.narrow(axis, span.start, len(span)) for span in self.held], dim=axis)

    def places(self, positions_N: Tensor) -> Tensor:
        """``[N]`` int64: where positions of the sequence stand among the tokens that this process holds, -1 where another holds them."""
        place_T = torch.full((self.tokens,), -1, device=positions_N.device)
        held_n = self.take(torch.arange(self.tokens, device=positions_N.device), axis=0)
        place_T[held_n] = torch.arange(len(held_n), device=positions_N.device)
        return place_T[positions_N]

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """``[tokens held]`` int64: every token's position within its document."""
        edges = torch.tensor(self.edges, device=device)
        starts = torch.repeat_interleave(edges[:-1], edges.diff())
        return self.take(torch.arange(self.tokens, device=device) - starts, axis=0)

    def document_ids(self, device: torch.device | str = "cpu") -> Tensor:
        """``[tokens held]`` int64: the number of every token's document."""
        lengths = torch.tensor(self.edges, device=device).diff()
        return self.take(torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths), axis=0)

    def next_token_targets(self, labels_BT: Tensor) -> Tensor:
        """Labels moved one place left, ignored at each document's last token: ``target[t]`` is what token t must predict."""
        targets_BT = torch.full_like(labels_BT, IGNORE_INDEX)
        targets_BT[:, :-1] = labels_BT[:, 1:]
        ends = [e - 1 for a, e in zip(self.edges, self.edges[1:], strict=False) if e > a]
        targets_BT[:, torch.tensor(ends, dtype=torch.int64, device=labels_BT.device)] = IGNORE_INDEX
        return targets_BT
