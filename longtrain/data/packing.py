"""Documents into sequences of exactly T tokens, each document seeing only itself.

Best-fit decreasing (Ding et al. 2024, "Fewer truncations improve language modeling", arXiv:2404.10830): documents longer than T
are cut into pieces of T tokens and a rest; then every piece, longest first, goes to the fullest sequence that still has room.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longtrain.data.sources import DataError, Document
from longtrain.span import IGNORE_INDEX

PADDING_ID = 0


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
    """One packed sequence. Padding, if any, is a last document of its own whose labels are all ignored."""

    input_ids_BT: Tensor
    """``[1, T]`` int64."""

    labels_BT: Tensor
    """``[1, T]`` int64, same positions as the ids, -100 where there is padding."""

    cu_seqlens: Tensor
    """``[documents + 1]`` int32, from 0 to T."""

    documents: tuple[str, ...]
    """Name and byte range of each piece, for messages."""

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids_BT.to(device), self.labels_BT.to(device), self.cu_seqlens.to(device), self.documents)


def cut(lengths: Sequence[int], seq_len: int, min_document_tokens: int = 0) -> list[Piece]:
    """Pieces of at most `seq_len` tokens, in document order. A single token predicts nothing, so no piece is that short."""
    pieces = []
    for document, length in enumerate(lengths):
        if length >= min_document_tokens:
            pieces += [Piece(document, a, min(a + seq_len, length)) for a in range(0, length, seq_len)]
    return [piece for piece in pieces if len(piece) > 1]


def best_fit(pieces: Sequence[Piece], seq_len: int) -> list[list[Piece]]:
    """Rows of pieces that together have at most `seq_len` tokens."""
    rows: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (tokens free, row), ascending: the first with enough room is the fullest
    for piece in sorted(pieces, key=lambda p: (-len(p), p.document, p.start)):
        at = bisect_left(room, (len(piece), 0))
        if at == len(room):
            free, row = seq_len, len(rows)
            rows.append([])
        else:
            free, row = room.pop(at)
        rows[row].append(piece)
        if free > len(piece):
            insort(room, (free - len(piece), row))
    return rows


class PackedDocuments:
    """Sequences of `seq_len` tokens, addressed by number: what is read is a function of the seed and the number alone."""

    def __init__(
        self,
        documents: Sequence[Document],
        seq_len: int,
        *,
        packing: str = "best_fit",
        min_document_tokens: int = 0,
        seed: int = 0,
    ) -> None:
        self.documents = documents
        self.seq_len = seq_len
        self.seed = seed
        pieces = cut([len(d.tokens) for d in documents], seq_len, min_document_tokens)
        if not pieces:
            longest = max((len(d.tokens) for d in documents), default=0)
            raise DataError(
                f"none of {len(documents)} documents (the longest has {longest} bytes) has 2 tokens and "
                f"data.min_document_tokens ({min_document_tokens}); lower that setting, or give longer documents"
            )
        self.rows = best_fit(pieces, seq_len) if packing == "best_fit" else [[piece] for piece in pieces]

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, epoch: int) -> np.ndarray:
        """The order of the rows in one pass over the data."""
        return np.random.default_rng([self.seed, 1, self.seq_len, epoch]).permutation(len(self.rows))

    def batch(self, number: int) -> Batch:
        """The sequence that is read as number `number`, counted over the passes."""
        epoch, index = divmod(number, len(self.rows))
        return self.read_row(int(self.order(epoch)[index]))

    def read_row(self, row: int) -> Batch:
        ids = np.full(self.seq_len, PADDING_ID, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORE_INDEX, dtype=np.int64)
        edges, names = [0], []
        for piece in self.rows[row]:
            document = self.documents[piece.document]
            here = slice(edges[-1], edges[-1] + len(piece))
            ids[here] = labels[here] = document.tokens[piece.start : piece.stop]
            edges.append(here.stop)
            names.append(f"{document.name}[{piece.start}:{piece.stop}]")
        if edges[-1] < self.seq_len:
            edges.append(self.seq_len)
        return Batch(
            torch.from_numpy(ids)[None],
            torch.from_numpy(labels)[None],
            torch.tensor(edges, dtype=torch.int32),
            tuple(names),
        )


def check_ids(batch: Batch, vocab_size: int) -> None:
    """Raise DataError naming the first id outside the vocabulary: its position in the sequence and in its document."""
    outside_T = (batch.input_ids_BT[0] < 0) | (batch.input_ids_BT[0] >= vocab_size)
    if outside_T.any():
        position = int(outside_T.int().argmax())
        piece = int(torch.searchsorted(batch.cu_seqlens, position, right=True)) - 1
        raise DataError(
            f"token id {int(batch.input_ids_BT[0, position])} at position {position} of the sequence (in {batch.documents[piece]}) "
            f"is outside the vocabulary of {vocab_size}; set model.vocab_size to at least {int(batch.input_ids_BT.max()) + 1}"
        )
