"""Mixers that see the whole sequence: their inputs are stored by group of channels, in whatever tier the plan says, with the same bits."""

from dataclasses import replace

import pytest
import torch

import longtrain as lt
from longtrain.offload import DeviceStore
from longtrain.ops.mixers import AttentionMixer, LongConvMixer
from longtrain.span import Span
from longtrain.stream.twopass import MixerInputs
from tests.stream.test_conv import TOKENS, WIDTH, GroupsOfThree, Layer, decoder_arguments, run, stack_of

pytestmark = pytest.mark.usefixtures("float64")
DISK, HOST, MIXED = lt.Split(), lt.Split(host=1.0), lt.Split(device=0.3, host=0.4)


class FakeCall:
    """What `MixerInputs` asks of a call."""

    indices = (0,)
    tokens = TOKENS
    plan = lt.Plan(chunk_tokens=7)

    def __init__(self) -> None:
        self.store = DeviceStore()


@pytest.mark.parametrize("kv", [DISK, HOST, MIXED, replace(HOST, compress=True)], ids=["disk", "host", "every tier", "never compressed"])
@pytest.mark.parametrize("store_outputs", [0.0, 1.0])
def test_the_same_bits_wherever_the_inputs_of_mixers_live(store_outputs, kv, disk):
    model = stack_of(Layer(GroupsOfThree(taps=TOKENS)), Layer(GroupsOfThree(taps=2 * TOKENS, causal=False)))
    x = torch.randn(1, TOKENS, WIDTH)
    tiers = dict(host_bytes=1 << 22, disk=lt.DiskSettings(path=disk, budget=1 << 23), staging_bytes=1 << 20)
    outcomes = []
    for offload in (None, lt.Offload(kv=kv, **tiers)):
        report = lt.apply(model, lt.Plan(chunk_tokens=7, store_outputs=store_outputs, offload=offload))
        outcomes.append(run(model, x, **decoder_arguments()))
        used = {name: tier.most for name, tier in report.store.regions.items()} if offload else {}
        report.undo()
    stayed, moved = outcomes
    for name in stayed:
        assert torch.equal(stayed[name], moved[name]), name
    wanted = ("disk",) if kv == DISK else ("host", "disk") if kv == MIXED else ("host",)
    assert all(used[tier] > 0 for tier in wanted), used


@pytest.mark.parametrize("mixer, shapes, groups", [
    (LongConvMixer(filter=torch.ones(8, 5), skip=torch.ones(8), group_channels=3), [(8,), (8,)], [slice(0, 3), slice(3, 6), slice(6, 9)]),
    (LongConvMixer(filter=torch.ones(2, 5), skip=torch.ones(8), group_channels=3), [(8,)], [slice(0, 4), slice(4, 8)]),
    (AttentionMixer(causal=False), [(4, 3), (2, 3), (2, 3)], [slice(0, 2), slice(2, 4)]),
], ids=["channels", "heads of filters", "heads"])  # fmt: skip
def test_a_group_is_read_alone(mixer, shapes, groups):
    call = FakeCall()
    inputs = [torch.randn(2, TOKENS, *shape) for shape in shapes]
    stored = MixerInputs(call, mixer)
    for span in (Span(0, 20), Span(20, TOKENS)):
        stored.put(span, [x[:, span.slice()] for x in inputs])
    for last in (False, True):
        found = list(stored.groups(mixer, last=last))
        assert [index for index, _, _ in found] == groups
        for (_, _, parts), (_, _, expected) in zip(found, mixer.by_group(*inputs), strict=True):
            assert all(part.is_contiguous() and torch.equal(part, x) for part, x in zip(parts, expected, strict=True))
        assert bool(call.store.names()) == (not last)


def test_the_backward_of_a_convolution_runs_no_forward(monkeypatch):
    """Its gradients need the inputs alone."""
    model = stack_of(Layer(GroupsOfThree(taps=TOKENS)))
    report = lt.apply(model, lt.Plan(chunk_tokens=7))
    forwards = []
    mix_into = LongConvMixer.mix_into
    monkeypatch.setattr(LongConvMixer, "mix_into", lambda self, *tensors: (forwards.append(self), mix_into(self, *tensors))[1])
    monkeypatch.setattr(LongConvMixer, "__call__", lambda self, *tensors: pytest.fail("a group was run with a graph"))
    run(model, torch.randn(1, TOKENS, WIDTH), **decoder_arguments())
    report.undo()
    assert len(forwards) == 3  # 8 channels, 3 at a time
