"""What counting alone achieves: the add-k unigram and bigram models of the training documents, in nats per token.

P(b | a) = (count(a b) + k) / (count(a) + k V), and the same without a. k is chosen on the training documents: every tenth of them
is held out, the others are counted, and the k of the grid that predicts the held-out ones best is used for counts of all. Of much data
a sample of whole documents is counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from longtrain.data.corpus import Corpus
from longtrain.data.packing import PackedDocuments

LARGEST_VOCABULARY = 1024
"""Beyond it pairs are not counted: there would be more kinds of them than tokens to count."""
COUNTED_TOKENS = 2**25
BLOCK = 2**20
K_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Baselines:
    """Cross entropy in nats per token on the validation targets, and the k each model uses."""

    unigram: float
    bigram: float
    unigram_k: float
    bigram_k: float


def count_bigrams(token_runs: Iterable[np.ndarray], vocabulary: int) -> np.ndarray:
    """``[V, V]``: how often token b (column) follows token a (row) within a run."""
    counts = np.zeros(vocabulary * vocabulary, dtype=np.int64)
    waiting: list[np.ndarray] = []
    for tokens in token_runs:
        for start in range(0, len(tokens) - 1, BLOCK):
            part = tokens[start : start + BLOCK + 1]
            waiting.append(part[:-1].astype(np.int64) * vocabulary + part[1:])
            if sum(map(len, waiting)) >= BLOCK or len(waiting) == 64:
                counts += np.bincount(np.concatenate(waiting), minlength=len(counts))
                waiting.clear()
    if waiting:
        counts += np.bincount(np.concatenate(waiting), minlength=len(counts))
    return counts.reshape(vocabulary, vocabulary)


def cross_entropy(train_counts: np.ndarray, counts: np.ndarray, k: float) -> float:
    """Nats per target of the add-k model of `train_counts [..., V]` on targets counted in `counts [..., V]`."""
    totals = train_counts.sum(-1, keepdims=True) + k * train_counts.shape[-1]
    return float(-(counts * np.log((train_counts + k) / totals)).sum() / counts.sum())


def compute_baselines(train: Corpus, validation: PackedDocuments, rows: Iterable[int], vocabulary: int) -> Baselines | None:
    """Both models on exactly the targets that the network is scored on: every token of `rows` but the first of each piece.

    None where the vocabulary is too large to count pairs, and where some tokens are read but not learned from.
    """
    if vocabulary > LARGEST_VOCABULARY or train.has_prompts:
        return None
    runs = (validation.corpus.tokens(p.document, p.start, p.stop) for row in rows for p in validation.row(row))
    targets_AB = count_bigrams(runs, vocabulary)
    sample = sample_documents(train)
    held_out_AB = count_bigrams((train.tokens(d)[:COUNTED_TOKENS] for d in sample[::10]), vocabulary)
    counted_AB = count_bigrams((train.tokens(d)[:COUNTED_TOKENS] for i, d in enumerate(sample) if i % 10), vocabulary)
    train.release()

    def tuned(axis) -> tuple[float, float]:
        held_out, counted, targets = (c.sum(axis=axis) for c in (held_out_AB, counted_AB, targets_AB))
        k = min(K_GRID, key=lambda k: cross_entropy(counted, held_out, k)) if counted.sum() and held_out.sum() else 1.0
        return cross_entropy(held_out + counted, targets, k), k

    unigram, unigram_k = tuned(axis=0)
    bigram, bigram_k = tuned(axis=())
    return Baselines(unigram=unigram, bigram=bigram, unigram_k=unigram_k, bigram_k=bigram_k)


def sample_documents(corpus: Corpus) -> list[int]:
    """All documents, in order; or as many, evenly spread, as have about COUNTED_TOKENS tokens."""
    apart = max(1, int(corpus.length_N.sum()) // COUNTED_TOKENS)
    return list(range(0, len(corpus), apart))
