"""Attention over ranks equals attention of one process, in float64, and moves the bytes that the formulas say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from longtrain.ops.attention.call import build_call
from longtrain.ops.attention.mask import visible
from longtrain.ops.mixers import AttentionMixer
from longtrain.parallel.alltoall import AllToAll, Alone, Heads
from longtrain.parallel.cost import Shape, received
from longtrain.parallel.double_ring import DoubleRing
from longtrain.parallel.layout import ARRANGEMENTS, Shards, spread
from longtrain.parallel.ranks import Ranks, Traffic
from longtrain.parallel.ring import Ring
from longtrain.parallel.travelling import TravellingQueries
from longtrain.parallel.way import Way, delta_of
from longtrain.span import Layout, Span
from tests.processes import run_ranks

TOLERANCE = 1e-12
"""Relative norm: float64 rounds at 1.1e-16, the longest sums have under 10^3 terms whose order may change."""

TOKENS, DIM = 37, 8
EDGES = (0, 1, 5, 5, 20, 31, TOKENS)
MASKS = {
    "causal": AttentionMixer(),
    "bidirectional": AttentionMixer(causal=False),
    "window": AttentionMixer(window_size=(6, 0)),
    "documents": AttentionMixer(documents=Layout(TOKENS, EDGES)),
    "documents and window": AttentionMixer(documents=Layout(TOKENS, EDGES), window_size=(4, 0)),
    "dropout": AttentionMixer(dropout_p=0.3, dropout_seed=7),
    "softcap": AttentionMixer(softcap=2.0),
    "sinks": AttentionMixer(window_size=(3, 0), sink_tokens=2),
}
HEADS = {"one kv head": (4, 1), "grouped": (6, 2), "odd groups": (6, 3), "odd heads": (5, 5)}


def tensors(heads: tuple[int, int], tokens: int = TOKENS, batch: int = 2) -> list[torch.Tensor]:
    """q, k, v, dout of the whole sequence; value dim unlike the head dim."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(heads[0], DIM), (heads[1], DIM), (heads[1], DIM + 2), (heads[0], DIM + 2)]
    return [torch.randn(batch, tokens, *shape, dtype=torch.float64, generator=generator) for shape in shapes]


def outcome(attention, q, k, v, dout) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def over_ranks(way: Way, mixer: AttentionMixer, q, k, v, dout) -> list[torch.Tensor]:
    """The same of this rank's part of each."""
    out, lse = way.attend(mixer, q, k, v)
    return [out, *(grad.to(dout.dtype) for grad in way.attend_vjp(mixer, dout, q, k, v, lse, delta_of(dout, out, lse)))]


def error_of(way, mixer: AttentionMixer, shards: Shards, heads, tokens: int = TOKENS, batch: int = 2) -> float:
    """The largest error of this rank's output and gradients, relative to the norm of the whole. A gradient that is exactly zero, as of a
    softmax over one key, is a difference of terms of the order of dout: its norm counts as a thousandth of dout's at least.
    """
    rank, whole = torch.distributed.get_rank(), tensors(heads, tokens, batch)
    expected = outcome(replace(mixer, backend="reference"), *whole)
    found = over_ranks(way, mixer, *(shards.take(x, rank) for x in whole))
    least = 1e-3 * whole[3].norm()
    return max(float((a - shards.take(b, rank)).norm() / b.norm().clamp_min(least)) for a, b in zip(found, expected, strict=True))


def two_d(ranks: dict[str, Ranks], shards: Shards, heads, inner) -> AllToAll:
    """Heads over every `heads`-group of neighbours, and the inner way over the groups."""
    spread_heads, across = ranks["heads"], ranks["ring"]
    members = tuple(shards.spans(across.rank * spread_heads.size + i) for i in range(spread_heads.size))
    grouped = shards.grouped(spread_heads.size)
    spans = tuple(grouped.spans(g) for g in range(across.size))
    return AllToAll(spread_heads, members, Heads(*heads, spread_heads.size, keys_travel=inner is Ring), inner(across, spans))


def ways(world: Ranks, shards: Shards, heads, groups=()) -> dict:
    spans = tuple(shards.spans(r) for r in range(world.size))
    found = {"ring": Ring(world, spans), "queries": TravellingQueries(world, spans)}
    if world.size <= heads[0]:
        found["all to all"] = AllToAll(world, spans, Heads(*heads, world.size), Alone(shards.grouped(world.size).spans(0)))
    for name, ranks in groups:
        found[f"{name}, double ring"] = DoubleRing(ranks["heads"], ranks["ring"], spans)
        if 1 < ranks["heads"].size <= heads[0] and ranks["ring"].size > 1:
            found[f"{name}, ring"] = two_d(ranks, shards, heads, Ring)
            found[f"{name}, queries"] = two_d(ranks, shards, heads, TravellingQueries)
    return found


def two_d_groups(world: int, rank: int) -> list:
    """2 x 2: the ranks of this one's row (heads, or a machine) and column (ring); every process makes every group, in one order. With fewer
    ranks, one row or one column of them."""
    if world != 4:
        return [("a row", {"heads": Ranks.of(), "ring": Ranks.alone()}), ("a column", {"heads": Ranks.alone(), "ring": Ranks.of()})]
    rows = [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    columns = [torch.distributed.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    return [("2 x 2", {"heads": Ranks.of(rows[rank // 2]), "ring": Ranks.of(columns[rank % 2])})]


def matrix(rank: int, world: int, masks, head_counts, layouts, sizes) -> None:
    ranks, groups = Ranks.of(), two_d_groups(world, rank)
    for tokens in sizes:
        for layout in layouts:
            shards = spread(tokens, world, inside=layout, stripe=4)
            for mask in masks:
                if MASKS[mask].documents is not None and tokens != TOKENS:
                    continue
                for heads in head_counts:
                    for name, way in ways(ranks, shards, HEADS[heads], groups).items():
                        error = error_of(way, MASKS[mask], shards, HEADS[heads], tokens, batch=1 if "documents" in mask else 2)
                        assert error <= TOLERANCE, f"P={world} rank {rank}, {name}, {layout}, {mask}, {heads}, T={tokens}: {error:.1e}"


def quick(rank: int, world: int) -> None:
    matrix(rank, world, MASKS, ["grouped"], ["zigzag"], [TOKENS])
    matrix(rank, world, ["causal"], ["one kv head", "odd heads", "odd groups"], ["striped"], [TOKENS, 5])
    matrix(rank, world, ["window"], ["odd groups"], ["contiguous"], [TOKENS])
    bytes_are_the_formulas(rank, world)
    routes_are_those_of_the_mask(rank, world)
    same_bits_every_time(rank, world)
    faults_are_seen(rank, world)


def test_two_ranks():
    run_ranks(quick, 2)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ARRANGEMENTS)
def test_every_way_mask_and_head_count(layout, world):
    run_ranks(whole_matrix, world, layout)


def whole_matrix(rank: int, world: int, layout: str) -> None:
    matrix(rank, world, MASKS, HEADS, [layout], [TOKENS, world])
    bytes_are_the_formulas(rank, world)
    routes_are_those_of_the_mask(rank, world)
    same_bits_every_time(rank, world)
    if world > 1:
        faults_are_seen(rank, world)


def counted(way, mixer, shards: Shards, heads, dtype=torch.float64) -> tuple[int, int]:
    """Bytes that this rank received in the forward and in the backward pass."""
    traffic = way.ranks.traffic
    q, k, v, dout = (shards.take(x, torch.distributed.get_rank()).to(dtype) for x in tensors(heads, shards.tokens, batch=1))
    before = traffic.total()
    out, lse = way.attend(mixer, q, k, v)
    between = traffic.total()
    way.attend_vjp(mixer, dout, q, k, v, lse, delta_of(dout, out, lse))
    return between - before, traffic.total() - between


def bytes_are_the_formulas(rank: int, world: int) -> None:
    """The formulas in the modules' docstrings, for N tokens that every rank needs; b = 2, w = 4 as in training, and Dv = D + 2."""
    tokens, (b, w), wide = 24 * world, (2, 4), 2 * DIM + 2
    shards, f = spread(tokens, world), (world - 1) / world
    mixer = AttentionMixer(causal=False)
    for H, K in [(12, 12), (12, 4), (12, 1)]:
        found = ways(Ranks.of(), shards, (H, K))
        expected = {
            "ring": (K * wide * b * tokens * f, K * wide * (b + w) * tokens * f),
            "queries": (H * (DIM * b + (DIM + 3) * w) * tokens * f, H * (wide * b + (DIM + 2) * w) * tokens * f),
            "all to all": _of_heads(H, K * wide * b, K * wide * (b + b), tokens / world * f),
        }
        if K < world:
            expected["all to all"] = _of_heads(H, world * wide * b, world * wide * (b + w), tokens / world * f)
        for name, way in found.items():
            if K >= world and K % world:
                continue
            assert counted(way, mixer, shards, (H, K), torch.bfloat16) == expected[name], (name, H, K, world)
    for name, ranks in two_d_groups(world, rank):
        traffic, (n, machines), kv = Traffic(), (ranks["heads"].size, ranks["ring"].size), wide * tokens / world
        spans = tuple(shards.spans(r) for r in range(world))
        way = DoubleRing(replace(ranks["heads"], traffic=traffic), replace(ranks["ring"], traffic=traffic), spans)
        q, k, v, dout = (shards.take(x, rank).to(torch.bfloat16) for x in tensors((4, 1), tokens, batch=1))
        out, lse = way.attend(mixer, q, k, v)
        inside, between = machines * (n - 1) * kv, (machines - 1) * kv
        assert +traffic.received == +Counter({"kv": inside * b, "kv between": between * b})
        way.attend_vjp(mixer, dout, q, k, v, lse, delta_of(dout, out, lse))
        made = traffic.received["dkv"] + traffic.received["dkv home"], traffic.received["dkv between"]
        assert made == (inside * w, between * w)
        assert (traffic.received["kv"], traffic.received["kv between"]) == (2 * inside * b, 2 * between * b)


    if world == 4:
        two_d_bytes(shards, two_d_groups(world, rank))


def two_d_bytes(shards: Shards, groups: list) -> None:
    """Heads and what goes over the groups, together."""
    (_, ranks), traffic = groups[0], Traffic()
    ranks = {name: replace(of, traffic=traffic) for name, of in ranks.items()}
    shape = Shape(heads=12, kv_heads=4, head_dim=DIM, value_dim=DIM + 2, itemsize=2)
    for name, inner in (("ring", Ring), ("queries", TravellingQueries)):
        found = counted(two_d(ranks, shards, (12, 4), inner), AttentionMixer(causal=False), shards, (12, 4), torch.bfloat16)
        expected = received(name, shape, shards.tokens, heads=2, ring=2)
        assert found == (expected.forward, expected.backward), (name, found, expected)


def _of_heads(H: int, keys: int, keys_and_gradients: int, tokens: float) -> tuple[float, float]:
    """Queries with bf16 elements and a wide LSE and delta, and the bytes of a token's keys."""
    return (H * ((2 * DIM + 2) * 2 + 4) + keys) * tokens, (H * ((3 * DIM + 2) * 2 + 8) + keys_and_gradients) * tokens


def routes_are_those_of_the_mask(rank: int, world: int) -> None:
    """Bytes of a ring and of travelling queries against a count over the dense mask: nothing travels further than it is needed."""
    H, K = 6, 2
    for layout in ("contiguous", "zigzag", "striped"):
        shards = spread(TOKENS, world, inside=layout, stripe=4)
        for mask in ("causal", "window", "documents"):
            mixer, found = MASKS[mask], ways(Ranks.of(), shards, (H, K))
            dense = dense_mask(mixer)
            keys = [journey(dense.T, shards, source, +1, whole_spans=False) for source in range(world)]
            queries = [journey(dense, shards, source, -1, whole_spans=True) for source in range(world)]
            for name, stops, step, here, follows in [
                ("ring", keys, 1, (K * (2 * DIM + 2) * 8,) * 2, K * (2 * DIM + 2) * 8),
                ("queries", queries, -1, (H * DIM * 8, H * (2 * DIM + 2 + 2) * 8), None),
            ]:
                cargo = sum(stops[(rank - step * h) % world][h - 1] for h in range(1, world) if len(stops[(rank - step * h) % world]) >= h)
                made = sum(stops[(rank - step * h) % world][0] for h in range(2, world) if len(stops[(rank - step * h) % world]) >= h)
                made += stops[rank][0] if stops[rank] else 0
                forward, backward = counted(found[name], mixer, shards, (H, K))
                made_forward, made_backward = (0, follows) if follows else (H * (DIM + 3) * 8, H * DIM * 8)
                assert forward == cargo * here[0] + made * made_forward, (name, layout, mask)
                assert backward == cargo * here[1] + made * made_backward, (name, layout, mask)


def dense_mask(mixer: AttentionMixer) -> torch.Tensor:
    q = torch.empty(1, TOKENS, 1, 1)
    options = mixer.arguments(Span(0, TOKENS), Span(0, TOKENS))
    for name in ("backend", "partials", "kernel_fallback"):
        del options[name]
    defaults = dict(sink_logits=None, block_stride=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False)
    call = build_call(q, q, q, **{"cu_seqlens_q": None, "cu_seqlens_k": None, **defaults, **options})
    dense, at = torch.zeros(TOKENS, TOKENS, dtype=torch.bool), torch.arange(TOKENS)
    for doc in call.documents:
        rows = slice(doc.q_start, doc.q_stop)
        dense[rows, rows] = visible(call, doc, at[rows], at[rows])
    return dense


def journey(needs: torch.Tensor, shards: Shards, source: int, step: int, whole_spans: bool) -> list[int]:
    """Tokens of the cargo of `source` that reach stop 1, 2, ...: ``needs[i, j]`` says that token i of it is needed where j is held."""
    ranks, stops = shards.ranks, []
    for h in range(1, ranks):
        wanted = 0
        for span in shards.spans(source):
            needed = []
            for later in range(h, ranks):
                columns = torch.cat([torch.arange(s.start, s.stop) for s in shards.spans((source + later * step) % ranks)])
                needed += needs[span.slice()][:, columns].any(1).nonzero().flatten().tolist()
            if needed:
                wanted += len(span) if whole_spans else max(needed) - min(needed) + 1
        if not wanted:
            break
        stops.append(wanted)
    return stops


def same_bits_every_time(rank: int, world: int) -> None:
    shards = spread(TOKENS, world, inside="zigzag")
    for name, way in ways(Ranks.of(), shards, (6, 2), two_d_groups(world, rank)).items():
        whole = [shards.take(x, rank).float() for x in tensors((6, 2))]
        first, second = (over_ranks(way, AttentionMixer(), *whole) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), name


class SwappedGradients(Ring):
    def attend_vjp(self, mixer, dout, *saved):
        dq, dk, dv = super().attend_vjp(mixer, dout, *saved)
        return dq, dv[..., :DIM], torch.nn.functional.pad(dk, (0, 2))


class ReplicasNotSummed(AllToAll):
    _summed = ()


def faults_are_seen(rank: int, world: int) -> None:
    """The comparison of this file fails for blocks taken for their neighbours', for dK and dV swapped, for replicas that are not summed."""
    tokens, heads = 12 * world, (6, 1)
    shards, ranks = spread(tokens, world), Ranks.of()
    spans = tuple(shards.spans(r) for r in range(world))
    faults = {
        "wrong hop": Ring(ranks, spans[-1:] + spans[:-1]),
        "swapped dK and dV": SwappedGradients(ranks, spans),
        "replicas": ReplicasNotSummed(ranks, spans, Heads(*heads, world), Alone((Span(0, tokens),))),
    }
    for name, way in faults.items():
        error = torch.tensor(error_of(way, AttentionMixer(), shards, heads, tokens))
        assert ranks.greatest(error) > 1e-3, f"{name} was not seen"
