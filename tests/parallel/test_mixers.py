"""Convolutions and mixers with a state, of which several processes share the sequence: loss and gradients are those of one process, in
float64, by every way, and the bytes are those of the formulas."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn

import longtrain as lt
from longtrain.nn import Hyena, LanguageModel, LongConv, ModelConfig, MonarchMixerBlock
from longtrain.ops.mixers import AttentionMixer
from longtrain.ops.state_mixers import LinearAttentionMixer
from longtrain.parallel.layout import spread
from longtrain.parallel.relay import hand_overs, stages
from longtrain.span import Layout
from tests.parallel.test_stream import PLANS, call, check, documents, in_every_tier, summed
from tests.processes import run_ranks
from tests.stream.conftest import VOCAB, assert_same, loss_and_grads

SHAPE = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_heads=4, num_kv_heads=2, initializer_range=0.2)
CALLS = {
    "one document": call,
    "documents": lambda: call(cu_seqlens=documents(1, 1, 21, 22, 47)),
    "a document of every few tokens": lambda: call(cu_seqlens=documents(*range(3, 70, 4))),
    "batch of two": lambda: call(tokens=37, batch=2),
    "fewest tokens": lambda: call(tokens=4),
}
MODELS = {
    "short filter": dict(layers=("conv",), conv_taps=5),
    "filter of a chunk": dict(layers=("conv",), conv_taps=17),
    "long filter": dict(layers=("conv",), conv_taps=40),
    "implicit filter": dict(layers=("conv",), conv_taps=90, conv_implicit=True),
    "linear": dict(layers=("linear",)),
    "delta": dict(layers=("delta",)),
    "lact": dict(layers=("lact",), lact_chunk=11),
    "lact, updates after every token": dict(layers=("lact",), lact_chunk=1),
    "all kinds": dict(layers=("conv", "linear", "attention", "delta", "lact", "window"), window=(9,), conv_taps=6, lact_chunk=10),
}
WAYS = {
    "cheapest": lt.Parallel(),
    "heads and channels": lt.Parallel(conv="channels", states="heads", layout="contiguous"),
    "heads and channels, striped": lt.Parallel(conv="channels", states="heads", layout="striped", stripe=2),
    "halo and scan": lt.Parallel(conv="halo", states="scan", layout="contiguous"),
    "halo and scan, zigzag": lt.Parallel(conv="halo", states="scan", layout="zigzag"),
    "halo and scan, striped": lt.Parallel(conv="halo", states="scan", layout="striped", stripe=2),
    "halo and scan, no heads": lt.Parallel(conv="halo", states="scan", heads=1, way="queries", stripe=3),
}
TWO_D = {"heads x scan": lt.Parallel(conv="channels", states="heads", heads=2, way="queries", layout="zigzag")}


def model_of(name: str, **changes):
    """Two layers, or one of each kind."""
    settings = {**MODELS[name], **changes}
    kinds = settings.pop("layers")
    return LanguageModel(ModelConfig(**{**SHAPE, **settings}, num_layers=max(2, len(kinds)), layers=kinds))


def quick(rank: int, world: int) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    pairs = [
        ("short filter", "documents", "halo and scan"), ("short filter", "batch of two", "halo and scan, zigzag"),
        ("filter of a chunk", "a document of every few tokens", "halo and scan, striped"),
        ("short filter", "documents", "heads and channels"), ("long filter", "documents", "heads and channels, striped"),
        ("implicit filter", "batch of two", "cheapest"), ("linear", "documents", "halo and scan"),
        ("linear", "batch of two", "halo and scan, striped"), ("linear", "one document", "heads and channels"),
        ("delta", "documents", "halo and scan, zigzag"), ("delta", "one document", "halo and scan, striped"),
        ("delta", "a document of every few tokens", "heads and channels, striped"), ("lact", "documents", "halo and scan"),
        ("lact", "one document", "halo and scan, zigzag"), ("lact", "batch of two", "cheapest"),
        ("delta", "fewest tokens", "halo and scan"), ("all kinds", "documents", "halo and scan, no heads"),
    ]  # fmt: skip
    for name, inputs, way in pairs:
        check(model_of(name), PLANS["chunks"], WAYS[way], CALLS[inputs](), f"{name}, {inputs}, {way}")
    check(model_of("linear"), PLANS["nothing stored"], WAYS["halo and scan"], CALLS["documents"](), "nothing stored")
    model = model_of("all kinds", layers=("conv", "delta", "lact", "attention"), window=None)
    check(model, PLANS["segments, half of it stored"], WAYS["halo and scan, striped"], CALLS["documents"](), "segments, half of it stored")
    filters_of_every_kind(rank, world, "striped")
    same_bits_every_time(rank, world)
    bytes_are_the_formulas(rank, world)


def test_two_ranks():
    run_ranks(quick, 2)


def every_way(rank: int, world: int, models: list[str]) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    ways = {**WAYS, **(TWO_D if world == 4 else {})}
    for i, name in enumerate(models):
        for k, (way, parallel) in enumerate(ways.items()):
            inputs, plan = list(CALLS)[(i + k) % len(CALLS)], list(PLANS)[(i + 2 * k) % len(PLANS)]
            if "lact" in MODELS[name]["layers"] and "few" in inputs:  # no update: plain autograd finds no gradient of its keys
                inputs = "documents"
            alone = world == 1 and name == "filter of a chunk"  # of 16 tokens; these are shorter
            if PLANS[plan].segment_layers > 1 and ("channels" in way or "long" in name or "implicit" in name or alone):
                plan = "chunks"
            check(model_of(name), PLANS[plan], parallel, CALLS[inputs](), f"P={world}, {name}, {inputs}, {plan}, {way}")


@pytest.mark.slow
@pytest.mark.parametrize("models", [list(MODELS)[:4], list(MODELS)[4:6], list(MODELS)[6:]], ids=["filters", "linear", "lact and all"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_model_and_way(world, models):
    run_ranks(every_way, world, models)


def the_rest(rank: int, world: int) -> None:
    torch.set_default_dtype(torch.float64)
    for layout in ("contiguous", "zigzag", "striped"):
        filters_of_every_kind(rank, world, layout)
    same_bits_every_time(rank, world)
    bytes_are_the_formulas(rank, world)


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_filters_of_every_kind_bits_and_bytes(world):
    run_ranks(the_rest, world)


def with_disk(rank: int, world: int, directory: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    plan = in_every_tier(directory, store_kv=0.5)
    model = model_of("all kinds", layers=("conv", "delta", "lact", "attention"), window=None)
    ways = {name: WAYS[name] for name in ("halo and scan, zigzag", "heads and channels")} | (TWO_D if world == 4 else {})
    for way, parallel in ways.items():
        check(model, plan, parallel, CALLS["documents"](), f"P={world}, disk, {way}")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_with_disk(world, disk):
    run_ranks(with_disk, world, disk)


class Stack(nn.Module):
    """Layers on hidden states, as a model of one's own has them: `make_layout` tells it what this process holds."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.make_layout = nn.ModuleList(layers), Layout.make

    def forward(self, x: torch.Tensor, cu_seqlens=None) -> tuple[torch.Tensor, Layout]:
        layout = self.make_layout(x.shape[1], cu_seqlens)
        x = layout.take(x)
        for layer in self.layers:
            x = layer(x, documents=layout)
        return x, layout


class StateAndFuture(nn.Module):
    """The delta rule and attention that looks ahead in one layer, which so needs two passes."""

    token_args: dict[str, int] = {}

    def __init__(self) -> None:
        super().__init__()
        self.before, self.beta, self.after = nn.Linear(12, 36), nn.Linear(12, 4), nn.Linear(12, 12)

    def mixers(self, *, documents=None):
        return LinearAttentionMixer(delta=True, documents=documents), AttentionMixer(causal=False, documents=documents)

    def example(self, tokens: int):
        return torch.randn(1, tokens, 12), {}

    def forward(self, x, *, documents=None, mix=None):
        first, second = self.mixers(documents=documents) if mix is None else (mix, mix)
        q, k, v = self.before(x).unflatten(-1, (4, -1)).chunk(3, dim=-1)
        x = x + self.after(first(q, nn.functional.normalize(k, dim=-1), v, self.beta(x).sigmoid()).flatten(-2)).tanh()
        return x + self.after(second(q, k, v).flatten(-2))


class OfLongConv(nn.Module):
    """A layer of one convolution, whatever it is."""

    token_args: dict[str, int] = {}

    def __init__(self, conv: LongConv) -> None:
        super().__init__()
        self.conv, self.after = conv, nn.Linear(12, 12)

    def mixers(self, *, documents=None):
        return (self.conv.mixer(documents),)

    def example(self, tokens: int):
        return torch.randn(1, tokens, 12), {}

    def forward(self, x, *, documents=None, mix=None):
        return x + self.after((self.conv.mixer(documents) if mix is None else mix)(x)).tanh()


def filters_of_every_kind(rank: int, world: int, layout: str) -> None:
    """Hyena, Monarch Mixer (which looks ahead), a learned butterfly, a state in two passes; T = 37."""
    torch.manual_seed(0)
    butterfly = LongConv(12, 73, causal=False, butterfly=40)
    with torch.no_grad():
        for p in butterfly.butterfly.parameters():
            p += 0.1 * torch.randn_like(p)  # no DFT any more
    layers = [Hyena(12, 40, order=3), MonarchMixerBlock(12, 40), OfLongConv(butterfly), OfLongConv(LongConv(12, 9, causal=False))]
    model = Stack(*layers, StateAndFuture())
    x, weights = torch.randn(1, 37, 12), torch.randn(1, 37, 12)

    def run(model, **arguments):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y, held = model(leaf, **arguments)
        (y * held.take(weights)).sum().backward()
        return {"x": leaf.grad, **{name: p.grad for name, p in model.named_parameters()}}

    for arguments in ({}, {"cu_seqlens": [0, 5, 30, 37]}):
        expected = run(copy.deepcopy(model), **arguments)
        ours = copy.deepcopy(model)
        states = "heads" if arguments else "scan"
        lt.apply(ours, lt.Plan(chunk_tokens=7), parallel=lt.Parallel(layout=layout, gradients="sum", stripe=2, states=states))
        assert_same(summed(run(ours, **arguments)), expected)


def same_bits_every_time(rank: int, world: int) -> None:
    for way in ("heads and channels, striped", "halo and scan, zigzag"):
        model = model_of("all kinds", layers=("conv", "delta", "lact"), window=None).float()
        lt.apply(model, PLANS["chunks"], parallel=WAYS[way])
        (loss, grads), (again, same) = (loss_and_grads(model, call()) for _ in range(2))
        assert loss == again and all(torch.equal(grads[name], same[name]) for name in grads), way


def bytes_are_the_formulas(rank: int, world: int) -> None:
    """Bytes counted while a step of two layers streams, of all ranks together, against `longtrain.parallel.cost_mixers`."""
    tokens = 16 * world
    shape = dict(hidden_size=8 * world, num_heads=2 * world, num_kv_heads=2 * world, head_dim=4)
    for name, way in [
        ("short filter", "halo and scan"), ("short filter", "halo and scan, zigzag"), ("long filter", "heads and channels"),
        ("linear", "heads and channels"), ("linear", "halo and scan"), ("linear", "halo and scan, striped"),
        ("delta", "halo and scan, zigzag"), ("lact", "heads and channels"), ("lact", "halo and scan, zigzag"),
    ]:  # fmt: skip
        model = model_of(name, **shape)
        report = lt.apply(model, lt.Plan(chunk_tokens=8 * world), parallel=WAYS[way])
        sharing = report.sharing
        traffic, shards = sharing.mesh.all.traffic, sharing.shards(tokens)
        loss = model(**call(tokens=tokens)).loss
        before = Counter(traffic.received)
        loss.backward()
        counted = torch.tensor([before.total(), traffic.total() - before.total()], dtype=torch.float64)
        dist.all_reduce(counted)
        choices = [sharing.choice(shape, shards, of_layer) for of_layer in sharing.shapes for shape in of_layer]
        costs = [chosen.costs[chosen.way] for chosen in choices]
        expected = torch.tensor([[of.forward, of.backward] for of in costs], dtype=torch.float64).sum(0) * world
        torch.testing.assert_close(counted, expected, rtol=1e-12, atol=0, msg=lambda m: f"{name}, {way}: {m}")
        assert all(chosen.way in sharing.explain(tokens) for chosen in choices)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_every_state_that_is_sent_in_a_chunk_is_received_in_it(layout, world):
    shards = spread(47, world, inside=layout, chunk_tokens=12, stripe=2)
    for backward in (False, True):
        of_ranks = [stages(shards, rank, backward=backward) for rank in range(world)]
        handed = 0
        for in_chunk in zip(*of_ranks, strict=True):
            sent = Counter((r, leg.target) for r, stage in enumerate(in_chunk) for leg in stage.legs if leg.target not in (None, r))
            first = {stage.legs[0].span: r for r, stage in enumerate(in_chunk)}
            begins = first[(max if backward else min)(first)]
            received = Counter(
                (leg.source, r) for r, stage in enumerate(in_chunk) for i, leg in enumerate(stage.legs)
                if leg.source not in (None, r) and not (i == 0 and r == begins)
            )  # fmt: skip
            received += Counter((stage.heir_of, r) for r, stage in enumerate(in_chunk) if stage.heir_of is not None)
            assert sent == received
            handed += sent.total()
        assert handed == hand_overs(shards)


@pytest.mark.parametrize("wrong, says", [
    (dict(conv="heads"), "parallel.conv must be one of auto, halo, channels, found 'heads'"),
    (dict(states="ring"), "parallel.states must be one of auto, heads, scan, found 'ring'"),
    (dict(machine=0), "parallel.machine must be an integer of at least 1, found 0"),
])
def test_wrong_settings(wrong, says):
    with pytest.raises(ValueError, match=says):
        lt.Parallel(**wrong)
