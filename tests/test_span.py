import pytest
import torch

from longtrain.span import Layout, Span, chunk_spans


def test_span_arithmetic():
    assert Span(2, 5) & Span(4, 9) == Span(4, 5)
    assert len(Span(2, 5) & Span(7, 9)) == 0
    assert Span(2, 9).split(5, 2, 20) == [Span(2, 5), Span(5, 9)]
    assert Span(3, 3).split(3) == [Span(3, 3)]
    assert torch.arange(10)[Span(4, 6).slice(2)].tolist() == [2, 3]
    with pytest.raises(ValueError, match="start <= stop"):
        Span(5, 4)


@pytest.mark.parametrize("tokens, chunk, lengths", [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 9, [3]), (0, 4, [])])
def test_chunks_cover_the_sequence(tokens, chunk, lengths):
    spans = chunk_spans(tokens, chunk)
    assert [len(s) for s in spans] == lengths
    assert [i for s in spans for i in range(s.start, s.stop)] == list(range(tokens))


@pytest.mark.parametrize("edges", [[0, 3, 3, 10], [0, 10], [0, 0, 1, 10]])
def test_positions_and_first_visible_by_document(edges):
    layout = Layout.make(10, torch.tensor(edges))
    expected = [i - max(e for e in edges if e <= i) for i in range(10)]
    assert layout.positions().tolist() == expected
    assert [i - layout.first_visible(i) for i in range(10)] == expected


@pytest.mark.parametrize("edges", [[1, 10], [0, 9], [0, 6, 4, 10], [0], [], [0, 3.5, 10], torch.tensor([0, 3.5, 10])])
def test_cu_seqlens_that_do_not_cover_the_tokens(edges):
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to the number of tokens \(10\)"):
        Layout.make(10, edges)


def test_edges_within_two_spans_name_the_same_documents():
    layout = Layout.make(20, [0, 4, 9, 15, 20])
    queries, keys = layout.edges_within(Span(8, 12), Span(4, 12))
    assert queries == (0, 1, 4) and keys == (0, 5, 8)
    queries, keys = layout.edges_within(Span(10, 12), Span(2, 12))
    assert queries == (0, 0, 0, 2) and keys == (0, 2, 7, 10)


def test_targets_never_cross_documents():
    layout = Layout.make(7, [0, 1, 4, 4, 7])
    targets = layout.next_token_targets(torch.arange(10, 17)[None])
    assert targets.tolist() == [[-100, 12, 13, -100, 15, 16, -100]]
    assert Layout.make(0).next_token_targets(torch.empty(1, 0, dtype=torch.int64)).shape == (1, 0)
