"""A state on its way along the ranks, some heads at a time: hops hide behind the work on other heads. What hops and work take is played on
a clock of its own, so that it is the same on any machine."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist

from longtrain.ops.state_mixers import LaCTMixer, LinearAttentionMixer
from longtrain.parallel.layout import spread
from longtrain.parallel.ranks import Ranks
from longtrain.parallel.scan import BLOCKS
from longtrain.parallel.states import ScanCarry
from longtrain.parallel.timeline import Posted, play
from longtrain.span import Span
from tests.processes import run_ranks

HEADS = BLOCKS
A_HOP = 0.5
"""Seconds for a head's state; a second is the work on a head."""


class Counted:
    """A mixer that counts its work: a head forward, or a head backward."""

    def step(self, span, state, *inputs):
        if state is None or isinstance(self, LaCTMixer):
            self.work[0] += inputs[0].shape[2]
        return super().step(span, state, *inputs)

    def step_vjp(self, span, state, inputs, dout, dstate):
        before = self.work[0] + inputs[0].shape[2]
        found = super().step_vjp(span, state, inputs, dout, dstate)
        self.work[0] = before
        return found


@dataclass(frozen=True, kw_only=True)
class CountedLinear(Counted, LinearAttentionMixer):
    work: list = field(default_factory=lambda: [0])


@dataclass(frozen=True, kw_only=True)
class CountedLaCT(Counted, LaCTMixer):
    work: list = field(default_factory=lambda: [0])


def waited(ranks: Ranks, clock, state: int, work) -> list[float]:
    """Seconds that each rank waits in `work`, over a link that takes A_HOP for a head of a state of so many bytes."""
    ranks.traffic.clock, ranks.traffic.log = clock, [Posted(0, clock(), {}, {})]
    work()
    logs: list = [None] * ranks.size
    dist.all_gather_object(logs, ranks.traffic.log)
    return [sum(played.waited.values()) for played in play(logs, state / HEADS / A_HOP)]


def hops(rank: int, world: int) -> None:
    ranks, shards = Ranks.of(), spread(8 * world, world)
    (span,) = shards.local_chunks(rank)
    rates, weights = torch.rand(1, 8, HEADS), torch.randn(HEADS, 3, 8, 16)
    for name, mixer, rest, a_rank in [  # fast weights are handed on when they have been used
        ("decay", CountedLinear(gated=True), [-rates], A_HOP),
        ("delta rule", CountedLinear(delta=True), [rates], A_HOP),
        ("fast weights", CountedLaCT(weights=weights, chunk_tokens=4), [rates[..., None].expand(-1, -1, -1, 3)], 1 + A_HOP),
    ]:
        q, k, v, dout = (torch.randn(1, 8, HEADS, 16) for _ in range(4))
        carry = ScanCarry(mixer, ranks, shards)
        carry.append(span, torch.nn.functional.normalize(k, dim=-1), v, *rest)
        state = 4 * torch.Size(mixer.state_shape(k, v, *rest)).numel()
        clock = lambda mixer=mixer: float(mixer.work[0])
        forward = waited(ranks, clock, state, lambda: carry.mix(span, q, None))
        backward = waited(ranks, clock, state, lambda: carry.mix_vjp(span, q, None, None, dout))[::-1]
        for what, found in (("forward", forward), ("backward", backward)):  # a rank waits for one head's state a hop, and not for all of it
            assert found == pytest.approx([a_rank * r for r in range(world)]), f"{name}, {what}: {found}"


def threads(rank: int, world: int) -> None:
    """A rank works on as many heads at a time as it has threads, whatever others have, and sends the same."""
    ranks, shards = Ranks.of(), spread(40, world, inside="zigzag", chunk_tokens=24)
    q, k, v, dout, rates = (torch.randn(1, shards.length(rank), 5, 16, generator=torch.Generator().manual_seed(i)) for i in range(5))
    found = []
    for count in (1, 1 + 2 * rank):
        torch.set_num_threads(count)
        carry = ScanCarry(LinearAttentionMixer(gated=True, delta=True), ranks, shards)
        made, entries = [], []
        for part in (parts := [span.slice() for span in shards.local_chunks(rank)]):
            span = Span(part.start, part.stop)
            carry.append(span, k[:, part] / 4, v[:, part], -rates[:, part].square(), rates[:, part, :, 0].sigmoid())
            made.append(carry.mix(span, q[:, part], None)[0])
            entries.append(carry.entry)
        for part, entry in zip(parts[::-1], entries[::-1], strict=True):
            span = Span(part.start, part.stop)
            carry.resume(span, entry, k[:, part] / 4, v[:, part], -rates[:, part].square(), rates[:, part, :, 0].sigmoid())
            made += [carry.mix_vjp(span, q[:, part], None, None, dout[:, part]), *carry.take_grad(span)]
        found.append(made)
    for one, several in zip(*found, strict=True):
        torch.testing.assert_close(several, one)


def both(rank: int, world: int) -> None:
    hops(rank, world)
    threads(rank, world)


def test_hops_hide_behind_the_work_on_other_heads_whatever_the_threads():
    run_ranks(both, 3)
