"""Which rank holds which tokens of a sequence.

A sequence is streamed in chunks, and each chunk is spread over all ranks; without streaming there is one chunk. Inside a chunk:

    contiguous   rank r holds the r-th of P equal parts. Under a causal mask the last rank has most to do.
    zigzag       2P parts, rank r holds parts r and 2P - 1 - r: equal work, two pieces a rank.
    striped      many parts, dealt out like cards: nearly equal work, also inside a chunk at an offset.

Striped attention (Brandon et al. 2023, arXiv:2311.09431) deals out single tokens. Here stripes are runs of them, since that is what the
attention op takes: each run is a call. With m stripes a rank the last rank has 1 / m more work than the mean in a chunk of its own, and
1 / (m n) in the whole of n chunks, for they see the same prefix: so few are enough.

Lengths need not divide: parts differ by one token, and documents cross ranks wherever they fall.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from longtrain.span import Layout, Span, chunk_spans

STRIPE = 64
"""Tokens of a stripe at least, when their number is chosen here: the tile of an attention kernel."""

IMBALANCE = 1 / 16
"""More work than the mean that one rank may have, when the number of stripes is chosen here."""


@dataclass(frozen=True, slots=True)
class Shards:
    """``parts[c][r]``: the spans of chunk c that rank r holds, ascending. A rank holds its chunks one after the other."""

    chunks: tuple[Span, ...]
    parts: tuple[tuple[tuple[Span, ...], ...], ...]

    @property
    def tokens(self) -> int:
        return self.chunks[-1].stop

    @property
    def ranks(self) -> int:
        return len(self.parts[0])

    @property
    def runs(self) -> int:
        """Spans of a chunk that a rank holds, at most."""
        return max(len(held) for part in self.parts for held in part)

    @property
    def pieces(self) -> list[tuple[int, int, Span]]:
        """(chunk, rank, span) of all that is held, in the order of positions."""
        held = [(span, c, r) for c, part in enumerate(self.parts) for r, spans in enumerate(part) for span in spans]
        return [(c, r, span) for span, c, r in sorted(held)]

    def spans(self, rank: int) -> tuple[Span, ...]:
        """All that `rank` holds, in its order."""
        return tuple(chain.from_iterable(part[rank] for part in self.parts))

    def length(self, rank: int) -> int:
        return total(self.spans(rank))

    def local_chunks(self, rank: int) -> list[Span]:
        """Where each chunk stands among the tokens that `rank` holds."""
        edges = [0, *accumulate(total(part[rank]) for part in self.parts)]
        return [Span(a, b) for a, b in zip(edges, edges[1:], strict=False)]

    def layout(self, rank: int, cu_seqlens: Tensor | Sequence[int] | None = None) -> Layout:
        """Positions and documents as `rank` sees them."""
        return Layout(self.tokens, Layout.make(self.tokens, cu_seqlens).edges, self.spans(rank))

    def permutation(self) -> Tensor:
        """``[tokens]`` int64: the positions in the order of ranks. ``x[permutation]`` has rank 0's tokens first."""
        order = [torch.arange(span.start, span.stop) for rank in range(self.ranks) for span in self.spans(rank)]
        return torch.cat(order)

    def take(self, x: Tensor, rank: int, axis: int = 1) -> Tensor:
        """The tokens of `rank`, of a tensor that has all of them along `axis`."""
        return self.layout(rank).take(x, axis)

    def join(self, parts: Sequence[Tensor], axis: int = 1) -> Tensor:
        """All tokens, from every rank's: the inverse of `take`."""
        inverse = torch.argsort(self.permutation()).to(parts[0].device)
        return torch.cat(list(parts), dim=axis).index_select(axis, inverse)

    def grouped(self, size: int) -> Shards:
        """The same, with every `size` ranks that follow each other taken as one."""
        groups = range(0, self.ranks, size)
        parts = (tuple(merged(chain.from_iterable(part[g : g + size])) for g in groups) for part in self.parts)
        return Shards(self.chunks, tuple(parts))


def spread(
    tokens: int, ranks: int, *, inside: str = "contiguous", chunk_tokens: int | None = None, stripe: int | None = None, least: int = 1
) -> Shards:
    """Spread a sequence over `ranks`, each chunk of `chunk_tokens` (None: the whole) as `inside` says, in stripes of `stripe` or more.

    Every rank has `least` tokens of every chunk, or more, in each of its spans: a last chunk too short for that is joined with the one
    before. Raises ValueError where even the whole sequence, or a chunk, is too short.
    """
    if inside not in ARRANGEMENTS:
        raise ValueError(f"layout must be one of {', '.join(ARRANGEMENTS)}, found {inside!r}")
    if tokens < ranks * least:
        few = "one token" if least == 1 else f"{least} tokens"
        raise ValueError(f"a sequence of {tokens} tokens cannot be spread over {ranks} ranks; give at least {few} a rank")
    if chunk_tokens is not None and chunk_tokens < ranks * least:
        raise ValueError(f"chunks of {chunk_tokens} tokens cannot be spread over {ranks} ranks; raise chunk_tokens")
    chunks = chunk_spans(tokens, chunk_tokens or tokens)
    if len(chunks) > 1 and len(chunks[-1]) < ranks * least:
        last = chunks.pop()
        chunks[-1] = Span(chunks[-1].start, last.stop)
    stripe = max(least, stripe or max(STRIPE, int(tokens * IMBALANCE / ranks)))
    return Shards(tuple(chunks), tuple(ARRANGEMENTS[inside](chunk, ranks, stripe, least) for chunk in chunks))


def _contiguous(chunk: Span, ranks: int, stripe: int, least: int) -> tuple[tuple[Span, ...], ...]:
    return tuple((part,) for part in _even(chunk, ranks))


def _zigzag(chunk: Span, ranks: int, stripe: int, least: int) -> tuple[tuple[Span, ...], ...]:
    if len(chunk) < 2 * ranks * least:
        return _contiguous(chunk, ranks, stripe, least)
    parts = _even(chunk, 2 * ranks)
    return tuple(merged((parts[r], parts[-1 - r])) for r in range(ranks))


def _striped(chunk: Span, ranks: int, stripe: int, least: int) -> tuple[tuple[Span, ...], ...]:
    parts = _even(chunk, ranks * max(1, len(chunk) // (ranks * stripe)))
    return tuple(merged(parts[r::ranks]) for r in range(ranks))


ARRANGEMENTS: dict[str, Callable[[Span, int, int, int], tuple[tuple[Span, ...], ...]]] = {
    "contiguous": _contiguous,
    "zigzag": _zigzag,
    "striped": _striped,
}


def _even(span: Span, count: int) -> list[Span]:
    edges = [span.start + i * len(span) // count for i in range(count + 1)]
    return [Span(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def merged(spans) -> tuple[Span, ...]:
    """In order, those that touch made one."""
    joined: list[Span] = []
    for span in sorted(spans):
        if joined and joined[-1].stop == span.start:
            joined[-1] = Span(joined[-1].start, span.stop)
        else:
            joined.append(span)
    return tuple(joined)


def total(spans: Sequence[Span]) -> int:
    return sum(map(len, spans))
