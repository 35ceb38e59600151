"""What update number n reads: a function of the configuration, the data and n alone. So the loader's position is n, and its
`fingerprint` says whether n still means the same. The next update is read in the background while the last one is computed.
"""

from __future__ import annotations

import hashlib
import math
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from longtrain.config.data import DataConfig
from longtrain.config.run import LengthStage
from longtrain.data.built import open_built
from longtrain.data.corpus import Corpus, corpus_in_memory, join, split
from longtrain.data.packing import Batch, PackedDocuments
from longtrain.data.recall import make_recall
from longtrain.data.sources import DataError, read_stdlib, read_text
from longtrain.span import Span

PERIOD = 4096
"""Sequences after which every part of a mixture has had its exact share."""


def open_data(data: DataConfig) -> tuple[Corpus, Corpus]:
    """Training and validation documents. Raises DataError."""
    if data.source == "stdlib":
        corpus = corpus_in_memory(read_stdlib(), "stdlib", by_name=True)
    elif data.source == "text":
        corpus = corpus_in_memory(read_text(data.files), "text")
    elif data.source == "recall":
        corpus = corpus_in_memory(make_recall(data.seed), "recall", by_name=True)
    else:
        corpus = join([open_built(source.path, source.path) for source in data.tokens])
    longest = int(corpus.length_N.argmax())
    if data.long_documents == "refuse" and corpus.length_N[longest] > data.seq_len:
        raise DataError(
            f"{corpus.name(longest)} has {corpus.length_N[longest]} tokens, and data.long_documents: refuse allows no more than "
            f"data.seq_len ({data.seq_len}); raise seq_len, or set long_documents: split"
        )
    return split(corpus, data.validation_fraction, data.seed)


def pack(corpus: Corpus, seq_len: int, data: DataConfig) -> PackedDocuments:
    return PackedDocuments(
        corpus, seq_len, packing=data.packing, isolate=data.isolate, min_document_tokens=data.min_document_tokens, seed=data.seed
    )


def validation_rows(validation: PackedDocuments, tokens: int | None) -> list[int]:
    """The sequences that every validation reads: all of them, or the first of a fixed shuffle."""
    count = len(validation) if tokens is None else math.ceil(tokens / validation.seq_len)
    return [int(row) for row in validation.order(0)[:count]]


class Mixture:
    """Sequences of one length: of all documents together, or each of one part of them where sources or long documents have weights."""

    def __init__(self, corpus: Corpus, seq_len: int, data: DataConfig) -> None:
        self.seed = data.seed
        self.seq_len = seq_len
        parts = weighted_parts(corpus, data)
        self.packed = [pack(corpus.take(documents), seq_len, data) for documents, _ in parts]
        self.counts = whole_shares(np.array([share for _, share in parts]))
        self._pattern: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return sum(map(len, self.packed))

    @property
    def padding(self) -> float:
        """Share of all sequences, each read once, that is padding."""
        return 1 - sum(int(packed.pieces.length_P.sum()) for packed in self.packed) / (len(self) * self.seq_len)

    @property
    def longest(self) -> int:
        """Tokens of the longest document in a sequence, or of the longest piece of one."""
        return max(int(packed.pieces.length_P.max()) for packed in self.packed)

    def batch(self, number: int, held: Sequence[Span] | None = None, into_2T: np.ndarray | None = None) -> Batch:
        """The sequence that is read as number `number`, or the part of it that a process holds."""
        if len(self.packed) == 1:
            return self.packed[0].batch(number, held, into_2T)
        period, index = divmod(number, PERIOD)
        pattern = self.pattern(period)
        part = int(pattern[index])
        return self.packed[part].batch(period * int(self.counts[part]) + int((pattern[:index] == part).sum()), held, into_2T)

    def pattern(self, period: int) -> np.ndarray:
        """``[PERIOD]``: which part each sequence of a period comes from, every part's evenly spaced from a random start."""
        kept, pattern = self._pattern
        if kept != period:
            starts = np.random.default_rng([self.seed, 3, period]).random(len(self.counts))
            places = np.concatenate([(np.arange(n) + start) / n for n, start in zip(self.counts, starts, strict=True)])
            pattern = np.repeat(np.arange(len(self.counts)), self.counts)[np.argsort(places, kind="stable")]
            self._pattern = period, pattern
        return pattern


def weighted_parts(corpus: Corpus, data: DataConfig) -> list[tuple[np.ndarray, float]]:
    """Documents that are packed together, and their share of the sequences: by source and, within it, by size times `long_weight`."""
    weights = [source.weight for source in data.tokens] or [None]
    if weights[0] is None and data.long_from_tokens is None:
        return [(np.arange(len(corpus)), 1.0)]
    usable_N = corpus.length_N >= max(2, data.min_document_tokens)
    long_N = corpus.length_N >= (data.long_from_tokens or np.inf)
    if data.long_from_tokens is not None and not long_N.any():
        raise DataError(
            f"data.long_from_tokens: no training document has {data.long_from_tokens} tokens (the longest has "
            f"{int(corpus.length_N.max())}), so none is read more often; lower it, or remove it and data.long_weight"
        )
    parts = []
    for source, weight in enumerate(weights):
        mine_N = usable_N & (corpus.source_N == source)
        if not mine_N.any():
            name = corpus.sources[source]
            raise DataError(f"{name} has no training document of enough tokens; lower data.min_document_tokens, or remove it")
        share = float(corpus.length_N[mine_N].sum()) if weight is None else weight
        sizes = [(mine_N & ~long_N, 1.0), (mine_N & long_N, data.long_weight)]
        sizes = [(np.flatnonzero(some_N), float(corpus.length_N[some_N].sum()) * factor) for some_N, factor in sizes if some_N.any()]
        parts += [(documents, share * size / sum(s for _, s in sizes)) for documents, size in sizes]
    return parts


def whole_shares(shares: np.ndarray) -> np.ndarray:
    """Of PERIOD sequences: whole numbers nearest to the shares (largest remainders), at least 1 each."""
    exact = shares / shares.sum() * PERIOD
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while (missing := PERIOD - int(counts.sum())) != 0:
        counts[np.argmax(exact - counts) if missing > 0 else np.argmax(np.where(counts > 1, counts - exact, -np.inf))] += np.sign(missing)
    return counts


class Rooms:
    """Memory for tokens, given out again when no tensor is left in it: to touch fresh pages takes ten times as long as to write to them."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, *shape: int) -> np.ndarray:
        """Of int64, not filled."""
        size = math.prod(shape)
        while self._free:
            memory = self._free.pop()
            if memory.size == size:  # others are of another stage of the length schedule: let go
                break
        else:
            memory = np.empty(size, dtype=np.int64)
        # Views of `given`, tensors too, keep it alive: it is the last array in their line of bases, as its own base is no array.
        given = np.frombuffer(memoryview(memory), dtype=np.int64)
        weakref.finalize(given, self._free.append, memory)
        return given.reshape(shape)


class Loader:
    """``loader.update(step)``: the sequences of update `step` (from 0). Reads `ahead` updates in advance, in one thread."""

    def __init__(
        self,
        stages: Sequence[LengthStage],
        data: DataConfig,
        corpus: Corpus,
        steps: int,
        ahead: int = 2,
        *,
        mine: Callable[[Sequence[int]], Sequence[int]] = list,
        held: Callable[[int], Sequence[Span] | None] = lambda seq_len: None,
    ) -> None:
        """Of the training documents `corpus`, through the length schedule `stages`, with everything filled in, until `steps`.

        Where several processes share the work, `mine` gives, of the numbers of an update's sequences, those that this one reads, and
        `held`, of a sequence of so many tokens, the spans that it reads (None: all).
        """
        self.stages, self.corpus, self.steps, self.ahead = stages, corpus, steps, ahead
        self.mine, self.held = mine, held
        self.mixtures = {stage.seq_len: Mixture(corpus, stage.seq_len, data) for stage in stages}
        self.fingerprint = fingerprint(corpus, data)
        self.waited = 0.0
        """Seconds that `update` has waited for reading."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._rooms = Rooms()
        self._coming: dict[int, Future[list[Batch]]] = {}

    def update(self, step: int) -> list[Batch]:
        """Raises what reading raised."""
        began = time.monotonic()
        wanted = range(step, min(step + self.ahead + 1, max(self.steps, step + 1)))
        for other in [s for s in self._coming if s not in wanted]:
            self._coming.pop(other).cancel()
        for s in wanted:
            if s not in self._coming:
                self._coming[s] = self._thread.submit(self.read, s)
        batches = self._coming.pop(step).result()
        self.waited += time.monotonic() - began
        return batches

    def read(self, step: int) -> list[Batch]:
        index = bisect_right([s.from_step for s in self.stages], step) - 1
        stage = self.stages[index]
        sequences = stage.tokens_per_update // stage.seq_len
        first = (step - stage.from_step) * sequences
        for before, after in pairwise(self.stages[: index + 1]):  # stages of the same length read on, not again
            first += (after.from_step - before.from_step) * (before.tokens_per_update // before.seq_len) * (before.seq_len == stage.seq_len)
        held = self.held(stage.seq_len)
        mixture, mine = self.mixtures[stage.seq_len], self.mine(range(first, first + sequences))
        rooms = self._rooms.take(len(mine), 2, stage.seq_len)
        batches = [mixture.batch(number, held, into_2T) for number, into_2T in zip(mine, rooms, strict=True)]
        self.corpus.release()
        return batches

    def close(self) -> None:
        """Stop reading ahead."""
        self._thread.shutdown(cancel_futures=True)


def fingerprint(corpus: Corpus, data: DataConfig) -> str:
    """Of everything but the length schedule that decides which tokens update number n reads: documents, split, packing, weights, seed."""
    weights = ",".join(str(source.weight) for source in data.tokens)
    said = [corpus.digest, data.packing, data.isolate, data.min_document_tokens, data.validation_fraction, data.seed]
    said += [weights, data.long_from_tokens, data.long_weight]
    return (
        f"{len(corpus)} documents, {int(corpus.length_N.sum())} tokens, {hashlib.blake2b(repr(said).encode(), digest_size=8).hexdigest()}"
    )
