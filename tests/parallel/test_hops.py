"""A state on its way along the ranks in blocks: one is handed on while the next comes, and what hops take is played on a clock of its own."""

import time

import pytest
import torch
import torch.distributed as dist

from longtrain.ops.state_mixers import LaCTMixer, LinearAttentionMixer
from longtrain.parallel.layout import spread
from longtrain.parallel.ranks import Ranks
from longtrain.parallel.scan import BLOCKS
from longtrain.parallel.states import ScanCarry
from longtrain.parallel.timeline import Posted, play
from tests.processes import run_ranks

A_STATE = 1e4
"""Seconds that it takes over the link: what is computed in between is nothing against it."""


def waited(ranks: Ranks, state: int, work) -> list[float]:
    """Seconds that each rank waits in `work`, over a link that takes A_STATE for so many bytes."""
    ranks.traffic.log = [Posted(0, time.thread_time(), {}, {})]
    work()
    logs: list = [None] * ranks.size
    dist.all_gather_object(logs, ranks.traffic.log)
    return [sum(played.waited.values()) for played in play(logs, state / A_STATE)]


def hops(rank: int, world: int) -> None:
    ranks, shards = Ranks.of(), spread(8 * world, world)
    (span,) = shards.local_chunks(rank)
    gate = -torch.rand(1, 8, 4)
    for name, mixer, rest, blocks in [
        ("decay", LinearAttentionMixer(gated=True), [gate], BLOCKS),
        ("delta rule", LinearAttentionMixer(delta=True), [gate.exp()], BLOCKS),
        ("fast weights", LaCTMixer(weights=torch.randn(4, 3, 8, 16), chunk_tokens=4), [torch.rand(1, 8, 4, 3)], 4),
    ]:
        q, k, v, dout = (torch.randn(1, 8, 4, 16) for _ in range(4))
        carry = ScanCarry(mixer, ranks, shards)
        carry.append(span, torch.nn.functional.normalize(k, dim=-1), v, *rest)
        state = 4 * torch.Size(mixer.state_shape(k, v, *rest)).numel()
        forward = waited(ranks, state, lambda: carry.mix(span, q, None))
        backward = waited(ranks, state, lambda: carry.mix_vjp(span, q, None, None, dout))[::-1]
        # The first block comes over r links, and behind it the others, one at a time.
        expected = [0.0, *((r + blocks - 1) / blocks * A_STATE for r in range(1, world))]
        for what, found in (("forward", forward), ("backward", backward)):
            assert found == pytest.approx(expected, rel=1e-2, abs=1e-2 * A_STATE), f"{name}, {what}: {found}, expected {expected}"


def test_hops_overlap():
    run_ranks(hops, 3)
