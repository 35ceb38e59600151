"""Documents into sequences of exactly T tokens, each document seeing only itself.

Three packings. `best_fit` (Ding et al. 2024, "Fewer truncations improve language modeling", arXiv:2404.10830): documents longer than T are
cut into pieces of T tokens and a rest; then every piece, longest first, goes to the fullest sequence that still has room. `concatenate`:
shuffled documents follow each other and are cut every T tokens. `one_document`: one piece a sequence.

Pieces are columns too (names end in P), in the order of the sequences: a million documents pack in seconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from longtrain.data.corpus import Corpus
from longtrain.data.sources import DataError
from longtrain.span import IGNORE_INDEX, Span

PADDING_ID = 0
PADDING_TOKENS = 512
"""Of a document of padding, at the most: tokens of padding see one another too, and the square of a long run of them would take time."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `[start, stop)` of document number `document`."""

    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One packed sequence. Padding, if any, comes last, in documents of its own of `PADDING_TOKENS` at most; its labels are all ignored."""

    input_ids_BT: Tensor
    """``[1, T]`` int64."""

    labels_BT: Tensor
    """``[1, T]`` int64, same positions as the ids, -100 where there is padding, and in prompts.

    Where several processes share the sequence, ids and labels are those that this one needs: ids where it holds tokens, labels one place
    behind; elsewhere padding."""

    cu_seqlens: Tensor
    """``[documents + 1]`` int32, from 0 to T."""

    documents: tuple[str, ...]
    """Name and token range of each piece, for messages."""

    sources: tuple[str, ...] = ()
    """Which sources each document of `cu_seqlens` comes from."""

    def to(self, device: torch.device) -> Batch:
        tensors = (t.to(device) for t in (self.input_ids_BT, self.labels_BT, self.cu_seqlens))
        return Batch(*tensors, self.documents, self.sources)


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Pieces of documents."""

    document_P: np.ndarray
    start_P: np.ndarray
    length_P: np.ndarray
    row_P: np.ndarray
    """The sequence that each is in."""

    def only(self, kept_P: np.ndarray) -> Pieces:
        """Some of them, a row each."""
        kept = self.ordered(np.flatnonzero(kept_P))
        return Pieces(kept.document_P, kept.start_P, kept.length_P, np.arange(len(kept.row_P)))

    def ordered(self, order_P: np.ndarray) -> Pieces:
        return Pieces(self.document_P[order_P], self.start_P[order_P], self.length_P[order_P], self.row_P[order_P])


def cut(length_N: np.ndarray, seq_len: int, min_document_tokens: int = 0) -> Pieces:
    """Pieces of at most `seq_len` tokens, in document order, a row each. A single token predicts nothing, so no piece is that short."""
    kept = np.flatnonzero(length_N >= max(min_document_tokens, 2))
    count = -(-length_N[kept] // seq_len)
    document_P = np.repeat(kept, count)
    start_P = (np.arange(len(document_P)) - np.repeat(np.cumsum(count) - count, count)) * seq_len
    length_P = np.minimum(seq_len, length_N[document_P] - start_P)
    long_enough = length_P > 1
    return Pieces(document_P[long_enough], start_P[long_enough], length_P[long_enough], np.arange(np.count_nonzero(long_enough)))


class _Lengths:
    """A set of whole numbers up to `largest` that finds its smallest member from a number on: bits, and bits of which words have any."""

    WORD = 1024

    def __init__(self, largest: int) -> None:
        self.words, self.used = [0] * (largest // self.WORD + 1), 0

    def add(self, number: int) -> None:
        self.words[number // self.WORD] |= 1 << number % self.WORD
        self.used |= 1 << number // self.WORD

    def remove(self, number: int) -> None:
        self.words[number // self.WORD] ^= 1 << number % self.WORD
        if not self.words[number // self.WORD]:
            self.used ^= 1 << number // self.WORD

    def first_from(self, number: int) -> int | None:
        word, bit = divmod(number, self.WORD)
        here = self.words[word] >> bit
        if here:
            return number + (here & -here).bit_length() - 1
        later = self.used >> word + 1
        if not later:
            return None
        word += (later & -later).bit_length()
        return word * self.WORD + (self.words[word] & -self.words[word]).bit_length() - 1


def best_fit(pieces: Pieces, seq_len: int) -> Pieces:
    """Rows of pieces that together have at most `seq_len` tokens, by rows, the longest piece of each first.

    Rows with the same room are alike, and so are pieces of the same length: they are handled together.
    """
    order_P = np.argsort(-pieces.length_P, kind="stable")
    lengths, counts = np.unique(-pieces.length_P[order_P], return_counts=True)
    row_P: list[int] = []
    rows = 0
    rows_with: dict[int, list[int]] = {}  # by tokens free
    free = _Lengths(seq_len)

    def give_back(used: list[int], room: int) -> None:
        if room > 1 and used:  # a piece has two tokens or more
            if room not in rows_with:
                rows_with[room] = []
                free.add(room)
            rows_with[room] += used

    for length, left in zip((-lengths).tolist(), counts.tolist(), strict=True):
        while left:
            room = free.first_from(length)
            if room is None:
                room, wanted = seq_len, -(-left // (seq_len // length))
                candidates, rows = list(range(rows, rows + wanted)), rows + wanted
            else:
                candidates = rows_with[room]
            each = room // length
            full = min(len(candidates), left // each)
            filled, rest = candidates[:full], left - full * each
            row_P += filled if each == 1 else [row for row in filled for _ in range(each)]
            remaining, partly = candidates[full:], []
            if rest and remaining:  # the last pieces of this length, in one row
                partly, remaining = remaining[:1], remaining[1:]
                row_P += partly * rest
            if room in rows_with:
                rows_with[room] = remaining
                if not remaining:
                    del rows_with[room]
                    free.remove(room)
            give_back(filled, room - each * length)
            give_back(partly, room - rest * length)
            left = rest if not partly else 0
    row_sorted_P = np.array(row_P, dtype=np.int64)
    packed = Pieces(pieces.document_P[order_P], pieces.start_P[order_P], pieces.length_P[order_P], row_sorted_P)
    return packed.ordered(np.argsort(row_sorted_P, kind="stable"))


def concatenate(length_N: np.ndarray, seq_len: int, min_document_tokens: int, seed: int) -> Pieces:
    """Shuffled documents one behind the other, cut every `seq_len` tokens: only the last row has padding."""
    kept = np.flatnonzero(length_N >= max(min_document_tokens, 1))
    kept = kept[np.random.default_rng([seed, 2]).permutation(len(kept))]
    stops = np.cumsum(length_N[kept])
    total = int(stops[-1]) if len(stops) else 0
    edges = np.unique(np.concatenate([[0], stops, np.arange(0, total, seq_len)]))
    first_P = edges[:-1]
    at_P = np.searchsorted(stops, first_P, side="right")
    start_P = first_P - (stops - length_N[kept])[at_P] if len(stops) else first_P
    return Pieces(kept[at_P], start_P, np.diff(edges), first_P // seq_len)


class PackedDocuments:
    """Sequences of `seq_len` tokens, addressed by number: what is read is a function of the seed and the number alone.

    With `isolate` false the pieces of a sequence see each other: they are one document to the model.
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_len: int,
        *,
        packing: str = "best_fit",
        isolate: bool = True,
        min_document_tokens: int = 0,
        seed: int = 0,
    ) -> None:
        self.corpus, self.seq_len, self.isolate, self.seed = corpus, seq_len, isolate, seed
        if packing == "concatenate":
            self.pieces = concatenate(corpus.length_N, seq_len, min_document_tokens, seed)
        else:
            self.pieces = cut(corpus.length_N, seq_len, min_document_tokens)
            if corpus.has_prompts:
                self.pieces = self.pieces.only(corpus.with_targets(self.pieces.document_P, self.pieces.start_P, self.pieces.length_P))
            if packing == "best_fit":
                self.pieces = best_fit(self.pieces, seq_len)
        if not len(self.pieces.row_P) or self.pieces.length_P.max() < 2:
            raise DataError(
                f"none of {len(corpus)} documents (the longest has {int(corpus.length_N.max(initial=0))} tokens) has 2 tokens and "
                f"data.min_document_tokens ({min_document_tokens}); lower that setting, or give longer documents"
            )
        self.edges = np.searchsorted(self.pieces.row_P, np.arange(self.pieces.row_P[-1] + 2))
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return len(self.edges) - 1

    def order(self, epoch: int) -> np.ndarray:
        """The order of the rows in one pass over the data."""
        kept, order = self._order
        if kept != epoch:
            order = np.random.default_rng([self.seed, 1, self.seq_len, epoch]).permutation(len(self))
            self._order = epoch, order
        return order

    def batch(self, number: int, held: Sequence[Span] | None = None, into_2T: np.ndarray | None = None) -> Batch:
        """The sequence that is read as number `number`, counted over the passes."""
        epoch, index = divmod(number, len(self))
        return self.read_row(int(self.order(epoch)[index]), held, into_2T)

    def row(self, row: int) -> list[Piece]:
        here = slice(self.edges[row], self.edges[row + 1])
        columns = (self.pieces.document_P, self.pieces.start_P, self.pieces.length_P)
        return [Piece(d, a, a + n) for d, a, n in zip(*(c[here].tolist() for c in columns), strict=True)]

    def read_row(self, row: int, held: Sequence[Span] | None = None, into_2T: np.ndarray | None = None) -> Batch:
        """The whole sequence; or, of the tokens that a process holds, what `Batch` says: nothing else is read. Ids and labels are in
        `into_2T`, int64, or in memory of their own."""
        whole = (Span(0, self.seq_len),)
        behind = whole if held is None else tuple(Span(span.start + 1, min(span.stop, self.seq_len - 1) + 1) for span in held)
        held = whole if held is None else tuple(held)
        needed = whole if held == whole else tuple(Span(a.start, max(a.stop, b.stop)) for a, b in zip(held, behind, strict=True))
        ids, labels = np.empty((2, self.seq_len), dtype=np.int64) if into_2T is None else into_2T
        edges, pieces, prompts = [0], self.row(row), []
        for piece in pieces:
            here = Span(edges[-1], edges[-1] + len(piece))
            at = piece.start - here.start
            for i in range(bisect_left(needed, here.start, key=attrgetter("stop")),
                           bisect_left(needed, here.stop, key=attrgetter("start"))):
                part = needed[i] & here
                ids[part.slice()] = self.corpus.tokens(piece.document, at + part.start, at + part.stop)
                if (target := self.corpus.is_target(piece.document, at + part.start, at + part.stop)) is not None:
                    prompts.append(part.start + np.flatnonzero(~target))
            edges.append(here.stop)
        labels[:] = ids
        for at in prompts:
            labels[at] = IGNORE_INDEX
        for values, spans, elsewhere in ((ids, held, PADDING_ID), (labels, behind, IGNORE_INDEX)):
            for gap in _gaps(spans, self.seq_len):
                values[gap.slice()] = elsewhere
            values[edges[-1] :] = elsewhere
        sources = [self.corpus.sources[self.corpus.source_N[p.document]] for p in pieces]
        if not self.isolate:
            edges, sources = [0, edges[-1]], ["+".join(sorted(set(sources)))]
        edges += [*range(edges[-1] + PADDING_TOKENS, self.seq_len, PADDING_TOKENS), self.seq_len] if edges[-1] < self.seq_len else []
        return Batch(
            torch.from_numpy(ids)[None],
            torch.from_numpy(labels)[None],
            torch.tensor(edges, dtype=torch.int32),
            tuple(f"{self.corpus.name(p.document)}[{p.start}:{p.stop}]" for p in pieces),
            tuple(sources),
        )


def _gaps(spans: Sequence[Span], tokens: int) -> list[Span]:
    """What lies between ascending spans of a sequence."""
    starts, stops = [0, *(span.stop for span in spans)], [*(span.start for span in spans), tokens]
    return [Span(a, b) for a, b in zip(starts, stops, strict=True) if a < b]


def check_ids(batch: Batch, vocab_size: int) -> None:
    """Raise DataError naming the first id outside the vocabulary: its position in the sequence and in its document."""
    outside_T = (batch.input_ids_BT[0] < 0) | (batch.input_ids_BT[0] >= vocab_size)
    if outside_T.any():
        position = int(outside_T.int().argmax())
        isolated = len(batch.sources) in (0, len(batch.documents))
        piece = int(torch.searchsorted(batch.cu_seqlens, position, right=True)) - 1
        named = batch.documents[piece] if isolated else f"one of {', '.join(batch.documents[:4])}"
        raise DataError(
            f"token id {int(batch.input_ids_BT[0, position])} at position {position} of the sequence (in {named}) "
            f"is outside the vocabulary of {vocab_size}; set model.vocab_size to at least {int(batch.input_ids_BT.max()) + 1}"
        )
