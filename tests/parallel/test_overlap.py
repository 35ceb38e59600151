"""Of what attention's ways send, at least four fifths hide behind what is computed meanwhile. What transfers and work take is played on a
clock of its own, on which work is a number of pairs of tokens, so that it is the same on any machine."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import inf

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longtrain.ops.mixers import AttentionMixer
from longtrain.parallel.alltoall import AllToAll, Alone, Heads
from longtrain.parallel.carry import QueriesTravel
from longtrain.parallel.layout import Shards, spread
from longtrain.parallel.ranks import Ranks
from longtrain.parallel.ring import Ring
from longtrain.parallel.timeline import Posted, play
from longtrain.parallel.travelling import TravellingQueries
from longtrain.parallel.way import Way, delta_of
from longtrain.span import Span
from tests.processes import run_ranks

HEADS = 16
HIDDEN = 0.8


@dataclass(frozen=True, kw_only=True)
class CountedPairs(AttentionMixer):
    """Causal attention that counts its pairs of tokens: five products of matrices backward, two forward."""

    work: list = field(default_factory=lambda: [0.0])

    def attend(self, queries: Span, keys: Span, q: Tensor, *others, **options):
        self.work[0] += 2 * self._pairs(queries, keys) * q.shape[2]
        return super().attend(queries, keys, q, *others, **options)

    def attend_vjp(self, queries: Span, keys: Span, dout: Tensor, *others, **options):
        self.work[0] += 5 * self._pairs(queries, keys) * dout.shape[2]
        return super().attend_vjp(queries, keys, dout, *others, **options)

    def _pairs(self, queries: Span, keys: Span) -> int:
        return sum(max(0, min(keys.stop, t + 1) - keys.start) for t in range(queries.start, queries.stop))


def whole(way: Way, mixer: AttentionMixer, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    out, lse = way.attend(mixer, q, k, v)
    way.attend_vjp(mixer, dout, q, k, v, lse, delta_of(dout, out, lse))


def streamed(ranks: Ranks, shards: Shards, mixer: AttentionMixer, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    """Queries that travel chunk by chunk, and back."""
    carry, made = QueriesTravel(mixer, ranks, shards), []
    chunks = [span.slice() for span in shards.local_chunks(ranks.rank)]
    for chunk in chunks:
        span = Span(chunk.start, chunk.stop)
        carry.append(span, k[:, chunk], v[:, chunk])
        made.append((span, chunk, *carry.mix(span, q[:, chunk], None)))
    for span, chunk, out, lse in reversed(made):
        carry.mix_vjp(span, q[:, chunk], out, lse, dout[:, chunk])


def hidden(ranks: Ranks, mixer: CountedPairs, share: float, work: Callable[[], None]) -> float:
    """The share of the transfers by which `work` is not longer than over endlessly fast links, if they take a `share` of the computing."""
    clock = lambda: mixer.work[0]
    ranks.traffic.clock, ranks.traffic.log = clock, [Posted(0, clock(), {}, {})]
    work()
    ranks.traffic.log.append(Posted(0, clock(), {}, {}))
    logs: list = [None] * ranks.size
    dist.all_gather_object(logs, ranks.traffic.log)
    received = max(sum(sum(event.received.values()) for event in log if isinstance(event, Posted)) for log in logs)
    transfers = share * max(log[-1].computed - log[0].computed for log in logs)
    at_once, later = (max(played.seconds for played in play(logs, link)) for link in (inf, received / transfers))
    return 1 - (later - at_once) / transfers


def ways(rank: int, world: int) -> None:
    ranks, mixer, tokens = Ranks.of(), CountedPairs(), 64 * world
    for layout, chunks in (("zigzag", 1), ("striped", 2)):
        shards = spread(tokens, world, inside=layout, chunk_tokens=tokens // chunks, stripe=8)
        spans, qkv = tuple(shards.spans(r) for r in range(world)), [torch.randn(1, shards.length(rank), HEADS, 4) for _ in range(4)]
        for name, work in {
            "ring": partial(whole, Ring(ranks, spans)),
            "queries": partial(whole, TravellingQueries(ranks, spans)),
            "heads": partial(whole, AllToAll(ranks, spans, Heads(HEADS, HEADS, world), Alone((Span(0, tokens),)))),
            "queries, chunk by chunk": partial(streamed, ranks, shards),
        }.items():
            found = hidden(ranks, mixer, 0.3, partial(work, mixer, *qkv))
            assert found >= HIDDEN, f"P={world}, {layout}, {name}: {found:.0%} hidden"


def test_two_ranks():
    run_ranks(ways, 2)


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_more_ranks(world):
    run_ranks(ways, world)
