"""What counting alone achieves: the add-k unigram and bigram models of the training documents, in nats per token.

P(b | a) = (count(a b) + k) / (count(a) + k V), and the same without a. k is chosen on the training documents: every tenth of them
is held out, the others are counted, and the k of the grid that predicts the held-out ones best is used for counts of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from longtrain.data.packing import PackedDocuments
from longtrain.data.sources import Document

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
    for tokens in token_runs:
        pairs = tokens[:-1].astype(np.int64) * vocabulary + tokens[1:]
        counts += np.bincount(pairs, minlength=vocabulary * vocabulary)
    return counts.reshape(vocabulary, vocabulary)


def cross_entropy(train_counts: np.ndarray, counts: np.ndarray, k: float) -> float:
    """Nats per target of the add-k model of `train_counts [..., V]` on targets counted in `counts [..., V]`."""
    totals = train_counts.sum(-1, keepdims=True) + k * train_counts.shape[-1]
    return float(-(counts * np.log((train_counts + k) / totals)).sum() / counts.sum())


def compute_baselines(train: Sequence[Document], validation: PackedDocuments, rows: Iterable[int], vocabulary: int) -> Baselines:
    """Both models on exactly the targets that the network is scored on: every token of `rows` but the first of each piece."""
    runs = (validation.documents[p.document].tokens[p.start : p.stop] for row in rows for p in validation.rows[row])
    targets_AB = count_bigrams(runs, vocabulary)
    held_out_AB = count_bigrams((d.tokens for d in train[::10]), vocabulary)
    counted_AB = count_bigrams((d.tokens for i, d in enumerate(train) if i % 10), vocabulary)

    def tuned(axis) -> tuple[float, float]:
        held_out, counted, targets = (c.sum(axis=axis) for c in (held_out_AB, counted_AB, targets_AB))
        k = min(K_GRID, key=lambda k: cross_entropy(counted, held_out, k)) if counted.sum() and held_out.sum() else 1.0
        return cross_entropy(held_out + counted, targets, k), k

    unigram, unigram_k = tuned(axis=0)
    bigram, bigram_k = tuned(axis=())
    return Baselines(unigram=unigram, bigram=bigram, unigram_k=unigram_k, bigram_k=bigram_k)
