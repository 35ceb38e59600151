"""Packing: nothing lost, nothing leaked, the same every time."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.data.packing import Batch, PackedDocuments, Piece, best_fit, check_ids, cut
from longtrain.data.sources import DataError, Document


def documents(*lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [Document(f"d{i}", generator.integers(1, 256, n, dtype=np.uint8)) for i, n in enumerate(lengths)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=40), st.integers(2, 64))
def test_every_token_that_can_be_predicted_is_packed_once(lengths, seq_len):
    rows = best_fit(cut(lengths, seq_len), seq_len)
    assert all(0 < sum(map(len, row)) <= seq_len for row in rows)
    packed = sorted((p.document, p.start, p.stop) for row in rows for p in row)
    expected = [(d, a, min(a + seq_len, n)) for d, n in enumerate(lengths) for a in range(0, n, seq_len) if min(a + seq_len, n) - a > 1]
    assert packed == expected


def test_best_fit_chooses_the_fullest_row_with_room():
    pieces = [Piece(0, 0, 6), Piece(1, 0, 5), Piece(2, 0, 4), Piece(3, 0, 3)]
    assert [[len(p) for p in row] for row in best_fit(pieces, 10)] == [[6, 4], [5, 3]]


def test_a_batch_has_exactly_t_tokens_isolated_documents_and_ignored_padding():
    docs = documents(70, 5, 9)
    packed = PackedDocuments(docs, 32)
    assert len(packed) == 3
    for row in range(len(packed)):
        batch = packed.read_row(row)
        assert batch.input_ids_BT.shape == batch.labels_BT.shape == (1, 32)
        edges = batch.cu_seqlens.tolist()
        assert edges[0] == 0 and edges[-1] == 32 and batch.cu_seqlens.dtype == torch.int32
        for piece, (start, stop) in zip(packed.rows[row], pairwise(edges), strict=False):
            tokens = torch.from_numpy(docs[piece.document].tokens[piece.start : piece.stop].astype(np.int64))
            assert torch.equal(batch.input_ids_BT[0, start:stop], tokens)
            assert torch.equal(batch.labels_BT[0, start:stop], tokens)
        used = sum(map(len, packed.rows[row]))
        assert (batch.labels_BT[0, used:] == -100).all() and used in edges
        assert len(batch.documents) == len(packed.rows[row])


def test_one_document_per_sequence():
    packed = PackedDocuments(documents(40, 5, 9), 32, packing="one_document")
    assert [[len(p) for p in row] for row in packed.rows] == [[32], [8], [5], [9]]


def test_short_documents_are_left_out_on_request():
    packed = PackedDocuments(documents(40, 5, 9), 32, min_document_tokens=9)
    assert {p.document for row in packed.rows for p in row} == {0, 2}


@pytest.mark.parametrize("lengths, least", [((1, 1), 0), ((40, 30), 41), ((), 0)])
def test_no_document_left_is_said_plainly(lengths, least):
    with pytest.raises(DataError, match="none of .*; lower that setting, or give longer documents"):
        PackedDocuments(documents(*lengths), 32, min_document_tokens=least)


def test_every_epoch_reads_every_row_in_another_order_and_the_seed_repeats_it():
    docs = documents(*[20] * 12)
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
