"""Who holds which tokens: every token once, whatever divides what."""

import pytest
import torch

from longtrain.parallel.layout import ARRANGEMENTS, spread
from longtrain.span import Layout, Span

SIZES = [(1, 1, None), (4, 4, None), (5, 4, None), (37, 3, None), (64, 4, 16), (70, 4, 16), (67, 4, 16), (30, 3, 3), (200, 2, 64)]


@pytest.mark.parametrize("inside", ARRANGEMENTS)
@pytest.mark.parametrize("tokens, ranks, chunk", SIZES)
def test_every_token_is_held_once(inside, tokens, ranks, chunk):
    shards = spread(tokens, ranks, inside=inside, chunk_tokens=chunk, stripe=4)
    assert sorted(shards.permutation().tolist()) == list(range(tokens))
    assert sum(shards.length(r) for r in range(ranks)) == tokens
    for rank in range(ranks):
        chunks = shards.local_chunks(rank)
        assert len(chunks) == len(shards.chunks) and chunks[-1].stop == shards.length(rank)
        assert all(len(chunk) for chunk in chunks), "a rank without tokens in a chunk"
        held = shards.take(torch.arange(tokens)[None], rank)[0]
        for local, whole in zip(chunks, shards.chunks, strict=True):
            part = held[local.slice()].tolist()
            assert part == sorted(part) and whole.start <= part[0] and part[-1] < whole.stop
    x = torch.randn(2, tokens, 3)
    assert torch.equal(shards.join([shards.take(x, r) for r in range(ranks)]), x)


def test_what_each_layout_is():
    assert spread(10, 2).parts == (((Span(0, 5),), (Span(5, 10),)),)
    assert spread(8, 2, inside="zigzag").parts == (((Span(0, 2), Span(6, 8)), (Span(2, 6),)),)
    assert spread(16, 2, inside="striped", stripe=4).parts == (((Span(0, 4), Span(8, 12)), (Span(4, 8), Span(12, 16))),)
    assert spread(9, 2, chunk_tokens=4).chunks == (Span(0, 4), Span(4, 9)), "a last chunk of one token joins the one before"
    for inside in ("contiguous", "zigzag", "striped"):
        held = spread(73, 4, inside=inside, chunk_tokens=16, stripe=1, least=2)
        assert min(len(span) for _, _, span in held.pieces) == 2 and [len(chunk) for chunk in held.chunks] == [16, 16, 16, 16, 9]
    assert len(spread(71, 4, chunk_tokens=16, least=2).chunks) == 4, "seven tokens are too few for four ranks"
    grouped = spread(16, 4, inside="zigzag").grouped(2)
    assert grouped.parts == (((Span(0, 4), Span(12, 16)), (Span(4, 12),)),)


@pytest.mark.parametrize("inside, most", [("contiguous", 2.0), ("zigzag", 1.05), ("striped", 1 + 1 / 16)])
def test_work_under_a_causal_mask_is_balanced(inside, most):
    for chunk in (4096, 1024):
        shards = spread(4096, 4, inside=inside, chunk_tokens=chunk)
        work = [sum(sum(range(s.start + 1, s.stop + 1)) for s in shards.spans(r)) for r in range(4)]
        assert max(work) * 4 / sum(work) <= most
    whole, chunked = (spread(4096, 4, inside="striped", chunk_tokens=chunk) for chunk in (4096, 1024))
    assert len(whole.spans(0)) == 16 and len(chunked.parts[0][0]) == 4


def test_positions_documents_and_targets_follow_the_tokens():
    edges, tokens = [0, 3, 3, 11, 20], 20
    shards = spread(tokens, 3, inside="zigzag", chunk_tokens=10)
    whole, labels = Layout.make(tokens, edges), torch.arange(100, 100 + tokens)[None]
    for rank in range(3):
        layout = shards.layout(rank, edges)
        for of_rank, of_all in [
            (layout.positions(), whole.positions()),
            (layout.document_ids(), whole.document_ids()),
            (layout.take(layout.next_token_targets(labels))[0], whole.next_token_targets(labels)[0]),
        ]:
            assert torch.equal(of_rank, shards.take(of_all, rank, axis=0))
    assert whole.document_ids().tolist() == [0] * 3 + [2] * 8 + [3] * 9


def test_too_few_tokens_and_unknown_layouts_are_refused():
    with pytest.raises(ValueError, match="3 tokens cannot be spread over 4 ranks"):
        spread(3, 4)
    with pytest.raises(ValueError, match="chunks of 3 tokens cannot be spread over 4 ranks; raise chunk_tokens"):
        spread(30, 4, chunk_tokens=3)
    with pytest.raises(ValueError, match="layout must be one of contiguous, zigzag, striped, found 'ring'"):
        spread(30, 4, inside="ring")
