"""The counting models against the same numbers computed token by token."""

import math

import numpy as np
import pytest

from longtrain.data import baselines
from longtrain.data.baselines import compute_baselines, count_bigrams, cross_entropy
from longtrain.data.corpus import corpus_in_memory
from longtrain.data.packing import PackedDocuments
from longtrain.data.sources import Document

V = 7


def documents(count, seed):
    """Sequences in which each token depends on the one before."""
    generator = np.random.default_rng(seed)
    made = []
    for index in range(count):
        tokens = [0]
        for _ in range(int(generator.integers(20, 90))):
            tokens.append((tokens[-1] + int(generator.choice([1, 1, 1, 3]))) % V)
        made.append(Document(f"d{index}", np.array(tokens, dtype=np.uint8)))
    return made


@pytest.mark.parametrize("seq_len", [16, 33, 200])
def test_baselines_equal_a_loop_over_the_targets(seq_len):
    train, held_out = documents(23, 1), documents(5, 2)
    validation = PackedDocuments(corpus_in_memory(held_out), seq_len)
    rows = range(0, len(validation), 2)
    found = compute_baselines(corpus_in_memory(train), validation, rows, V)

    def pair(a, b):
        followers = [int(y) for d in train for x, y in zip(d.tokens, d.tokens[1:], strict=False) if x == a]
        return (followers.count(b) + found.bigram_k) / (len(followers) + found.bigram_k * V)

    followers = [int(y) for d in train for y in d.tokens[1:]]
    nats_one, nats_two, targets = 0.0, 0.0, 0
    for row in rows:
        for piece in validation.row(row):
            tokens = [int(t) for t in held_out[piece.document].tokens[piece.start : piece.stop]]
            for a, b in zip(tokens, tokens[1:], strict=False):
                nats_one -= math.log((followers.count(b) + found.unigram_k) / (len(followers) + found.unigram_k * V))
                nats_two -= math.log(pair(a, b))
                targets += 1
    assert found.unigram == pytest.approx(nats_one / targets, rel=1e-12)
    assert found.bigram == pytest.approx(nats_two / targets, rel=1e-12)
    assert found.bigram < found.unigram - 0.5


def test_bigrams_do_not_cross_documents():
    counts = count_bigrams([np.array([1, 2], dtype=np.uint8), np.array([3, 1], dtype=np.uint8)], 4)
    assert counts.sum() == 2 and counts[1, 2] == counts[3, 1] == 1


def test_pairs_are_counted_across_the_blocks_that_are_held(monkeypatch):
    monkeypatch.setattr(baselines, "BLOCK", 3)
    runs = [np.array(run, dtype=np.uint8) for run in ([0, 1, 2, 3, 4, 5, 6, 0], [1], [2, 3, 4, 5], [6, 6])]
    pairs = [(int(a), int(b)) for run in runs for a, b in zip(run, run[1:], strict=False)]
    assert {(a, b): count_bigrams(runs, V)[a, b] for a, b in pairs} == {pair: pairs.count(pair) for pair in pairs}
    assert count_bigrams(runs, V).sum() == len(pairs)


def test_of_much_data_a_sample_is_counted_and_of_many_kinds_of_tokens_nothing(monkeypatch):
    monkeypatch.setattr(baselines, "COUNTED_TOKENS", 300)
    corpus = corpus_in_memory(documents(40, 1))
    sample = baselines.sample_documents(corpus)
    assert 2 < len(sample) < 20 and sample == sorted(sample)
    assert compute_baselines(corpus, PackedDocuments(corpus, 32), [0], 2**17) is None


def test_add_k_keeps_unseen_pairs_finite_and_uniform():
    unseen = np.zeros((V, V), dtype=np.int64)
    assert cross_entropy(unseen, unseen + 1, k=0.1) == pytest.approx(math.log(V))
