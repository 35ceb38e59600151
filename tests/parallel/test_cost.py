"""The formulas of traffic: those of the design's table, and the choices that follow from them."""

from __future__ import annotations

import pytest

from longtrain.parallel.cost import Shape, choose, received

N, D = 1 << 20, 128


def shape(heads=32, kv_heads=8, **changes) -> Shape:
    return Shape(heads=heads, kv_heads=kv_heads, head_dim=D, value_dim=D, itemsize=2, **changes)


@pytest.mark.parametrize("P", [2, 4, 8])
@pytest.mark.parametrize("H, K", [(32, 8), (32, 32), (64, 8)])
def test_the_table(P, H, K):
    """bf16 with float32 sums; what a row of the table leaves out is written behind it: LSE and delta, and keys that are sent again."""
    f, s = (P - 1) / P, shape(H, K)
    heads, ring, queries = received("heads", s, N, heads=P), received("ring", s, N, ring=P), received("queries", s, N, ring=P)
    assert heads.forward == (4 * H + 4 * K) * (N / P) * D * f + 4 * H * (N / P) * f
    assert heads.backward == (6 * H + 4 * K) * (N / P) * D * f + 4 * K * (N / P) * D * f + 8 * H * (N / P) * f
    assert (ring.forward, ring.backward) == (4 * N * K * D * f, 12 * N * K * D * f)
    assert queries.forward == 6 * N * H * D * f + 4 * N * H * f
    assert queries.backward == 8 * N * H * D * f + 8 * N * H * f


@pytest.mark.parametrize("P, H, K", [(8, 32, 4), (8, 32, 1), (16, 32, 8)])
def test_more_ranks_than_kv_heads(P, H, K):
    """Each kv head on P / K ranks; the gradients of its replicas come home wide."""
    f, heads = (P - 1) / P, received("heads", shape(H, K), N, heads=P)
    assert heads.forward == (4 * H / P + 4) * N * D * f + 4 * H * (N / P) * f
    assert heads.backward == (6 * H / P + 8) * N * D * f + 4 * N * D * f + 8 * H * (N / P) * f


def test_choices():
    full, window = shape(), shape(window=1024)
    assert choose(full, N, heads=8, ring=1, chunks=64).way == "heads"
    assert choose(window, N, heads=8, ring=1, chunks=64).way == "halo", "a short window: its halo is less than an exchange of all"
    assert choose(shape(window=60_000), N, heads=8, ring=1, chunks=64).way == "heads"
    assert choose(full, N, heads=1, ring=8, chunks=64).way == "ring", "two passes with 8 of 32 heads cost less than queries that travel"
    assert choose(full, N, heads=1, ring=8, chunks=64, segment_layers=2).way == "queries"
    assert choose(shape(8, 8), N, heads=1, ring=8, chunks=64).way == "queries"
    said = str(choose(full, N, heads=8, ring=4, chunks=64))
    assert "ring (" in said and "MiB" in said and "not halo: a query sees all that came before it" in said


@pytest.mark.parametrize("wrong, says", [
    (dict(heads=8, ring=1, way="ring"), "all ranks exchange heads; set parallel.heads below their number"),
    (dict(heads=1, ring=8, way="ring", segment_layers=2), "two passes over the sequence"),
    (dict(heads=1, ring=8, way="halo"), "a query sees all that came before it"),
])
def test_ways_that_cannot_be(wrong, says):
    with pytest.raises(ValueError, match=says):
        choose(shape(), N, chunks=64, **wrong)
    with pytest.raises(ValueError, match="no way to spread this layer"):
        choose(shape(causal=False), N, heads=1, ring=8, chunks=64, segment_layers=2)
