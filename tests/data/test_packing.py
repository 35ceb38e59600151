"""Packing: nothing lost, nothing leaked, the same every time."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longtrain.data.corpus import corpus_in_memory
from longtrain.data.packing import Batch, PackedDocuments, best_fit, check_ids, concatenate, cut
from longtrain.data.sources import DataError, Document


def corpus(*lengths, seed=0):
    generator = np.random.default_rng(seed)
    return corpus_in_memory([Document(f"d{i}", generator.integers(1, 256, n, dtype=np.uint8)) for i, n in enumerate(lengths)])


def rows_of(pieces):
    """Lists of (document, start, stop)."""
    rows = [[] for _ in range(int(pieces.row_P.max(initial=-1)) + 1)]
    for row, d, a, n in zip(*(c.tolist() for c in (pieces.row_P, pieces.document_P, pieces.start_P, pieces.length_P)), strict=True):
        rows[row].append((d, a, a + n))
    return rows


def best_fit_one_by_one(lengths, seq_len):
    """The tokens free in each row, by the textbook: longest piece first, into the fullest row that has room."""
    free = []
    for length in sorted(lengths, reverse=True):
        room = min((f for f in free if f >= length), default=None)
        if room is None:
            free.append(seq_len - length)
        else:
            free[free.index(room)] -= length
    return sorted(free)


LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=60)
drawn = partial(settings, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
"""The same examples in every run, on a machine of any speed."""


@drawn(max_examples=100)
@given(LENGTHS, st.integers(2, 64))
def test_every_token_that_can_be_predicted_is_packed_once(lengths, seq_len):
    rows = rows_of(best_fit(cut(np.array(lengths), seq_len), seq_len))
    assert all(0 < sum(b - a for _, a, b in row) <= seq_len for row in rows)
    expected = [(d, a, min(a + seq_len, n)) for d, n in enumerate(lengths) for a in range(0, n, seq_len) if min(a + seq_len, n) - a > 1]
    assert sorted(piece for row in rows for piece in row) == expected


@drawn(max_examples=300)
@given(LENGTHS, st.sampled_from([2, 7, 64, 1023, 1024, 3000]))
def test_best_fit_fills_rows_as_the_textbook_does(lengths, seq_len):
    pieces = cut(np.array(lengths), seq_len)
    free = [seq_len - sum(b - a for _, a, b in row) for row in rows_of(best_fit(pieces, seq_len))]
    assert sorted(free) == best_fit_one_by_one(pieces.length_P.tolist(), seq_len)


def test_best_fit_chooses_the_fullest_row_with_room():
    rows = rows_of(best_fit(cut(np.array([6, 5, 4, 3]), 10), 10))
    assert rows == [[(0, 0, 6), (2, 0, 4)], [(1, 0, 5), (3, 0, 3)]]


@drawn(max_examples=100)
@given(LENGTHS, st.integers(2, 64))
def test_concatenation_loses_nothing_and_pads_only_the_end(lengths, seq_len):
    rows = rows_of(concatenate(np.array(lengths), seq_len, 0, seed=0))
    assert [sum(b - a for _, a, b in row) for row in rows[:-1]] == [seq_len] * (len(rows) - 1)
    joined = [(d, t) for row in rows for d, a, b in row for t in range(a, b)]
    order = list(dict.fromkeys(d for d, _ in joined))
    assert joined == [(d, t) for d in order for t in range(lengths[d])] and sorted(order) == list(range(len(lengths)))


def test_a_million_documents_are_packed_almost_without_padding():
    lengths = np.random.default_rng(0).integers(2, 3000, 1_000_000)
    packed = best_fit(cut(lengths, 8192), 8192)
    assert packed.length_P.sum() == lengths.sum()
    assert packed.length_P.sum() / (8192 * (packed.row_P[-1] + 1)) > 0.999


@pytest.mark.parametrize("packing", ["best_fit", "concatenate", "one_document"])
def test_a_batch_has_exactly_t_tokens_isolated_documents_and_ignored_padding(packing):
    docs = corpus(70, 5, 9)
    packed = PackedDocuments(docs, 32, packing=packing)
    assert len(packed) == {"best_fit": 3, "concatenate": 3, "one_document": 5}[packing]
    for row in range(len(packed)):
        batch = packed.read_row(row)
        assert batch.input_ids_BT.shape == batch.labels_BT.shape == (1, 32)
        edges = batch.cu_seqlens.tolist()
        assert edges[0] == 0 and edges[-1] == 32 and batch.cu_seqlens.dtype == torch.int32
        pieces = packed.row(row)
        for piece, (start, stop) in zip(pieces, pairwise(edges), strict=False):
            tokens = torch.from_numpy(docs.tokens(piece.document, piece.start, piece.stop).astype(np.int64))
            assert torch.equal(batch.input_ids_BT[0, start:stop], tokens)
            assert torch.equal(batch.labels_BT[0, start:stop], tokens)
        used = sum(map(len, pieces))
        assert (batch.labels_BT[0, used:] == -100).all() and used in edges
        assert len(batch.documents) == len(batch.sources) == len(pieces)


def test_without_isolation_a_sequence_is_one_document_and_its_padding():
    batch = PackedDocuments(corpus(20, 8), 32, isolate=False).read_row(0)
    assert batch.cu_seqlens.tolist() == [0, 28, 32] and len(batch.documents) == 2
    ids = torch.tensor([[300] * 32])
    with pytest.raises(DataError, match=r"\(in one of d0\[0:20\], d1\[0:8\]\)"):
        check_ids(Batch(ids, ids, batch.cu_seqlens, batch.documents, batch.sources), 256)


@pytest.mark.parametrize("isolate, tokens", [(True, 20), (False, 20), (True, 2068), (True, 1044)])
def test_padding_is_cut_into_short_documents(isolate, tokens):
    batch = PackedDocuments(corpus(20), tokens, isolate=isolate).read_row(0)
    edges = batch.cu_seqlens.tolist()
    assert edges == {20: [0, 20], 1044: [0, 20, 532, 1044], 2068: [0, 20, 532, 1044, 1556, 2068]}[tokens]
    assert (batch.labels_BT[0, 20:] == -100).all() and len(batch.sources) == 1


def test_one_document_per_sequence():
    packed = PackedDocuments(corpus(40, 5, 9), 32, packing="one_document")
    assert [[len(p) for p in packed.row(row)] for row in range(len(packed))] == [[32], [8], [5], [9]]


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_short_documents_are_left_out_on_request(packing):
    packed = PackedDocuments(corpus(40, 5, 9), 32, min_document_tokens=9, packing=packing)
    assert {p.document for row in range(len(packed)) for p in packed.row(row)} == {0, 2}


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
@pytest.mark.parametrize("lengths, least", [((1,), 0), ((40, 30), 41), ((), 0)])
def test_no_document_left_is_said_plainly(lengths, least, packing):
    with pytest.raises(DataError, match="none of .*; lower that setting, or give longer documents"):
        PackedDocuments(corpus(*lengths), 32, min_document_tokens=least, packing=packing)


def test_every_epoch_reads_every_row_in_another_order_and_the_seed_repeats_it():
    docs = corpus(*[20] * 12)
    packed = PackedDocuments(docs, 20, seed=3)
    epochs = [[packed.batch(e * 12 + i).documents for i in range(12)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert [PackedDocuments(docs, 20, seed=3).batch(i).documents for i in range(12)] == epochs[0]
    assert [PackedDocuments(docs, 20, seed=4).batch(i).documents for i in range(12)] != epochs[0]


@pytest.mark.parametrize("wrong, position, document", [(300, 5, "b"), (-1, 0, "a")])
def test_ids_outside_the_vocabulary_are_named_with_their_position_and_document(wrong, position, document):
    ids = torch.ones(1, 8, dtype=torch.int64)
    batch = Batch(ids, ids, torch.tensor([0, 4, 8], dtype=torch.int32), ("a[0:4]", "b[0:4]"))
    check_ids(batch, 256)
    ids[0, position] = wrong
    with pytest.raises(DataError, match=rf"token id {wrong} at position {position} .*\(in {document}\[0:4\]\).* vocabulary of 256"):
        check_ids(batch, 256)
