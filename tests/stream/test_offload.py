"""A step whose tensors live in slower tiers gives the very bits of one whose tensors stay."""

from __future__ import annotations

import copy
import io
import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

import longtrain as lt
from longtrain.offload import DEVICE, TieredStore
from longtrain.span import Span
from tests.stream.conftest import VOCAB, loss_and_grads, make_model

TOKENS = 70
DISK, HOST, MIXED = lt.Split(), lt.Split(host=1.0), lt.Split(device=0.3, host=0.4)
PLACEMENTS = {
    "all on disk": dict(inputs=DISK, gradients=DISK, outputs=DISK, kv=DISK),
    "all on the host": dict(inputs=HOST, gradients=HOST, outputs=HOST, kv=HOST),
    "every tier": dict(inputs=MIXED, gradients=MIXED, outputs=MIXED, kv=MIXED),
    "outputs on disk": dict(outputs=DISK),
    "inputs on the host, by layer": dict(inputs=(HOST, DISK, MIXED)),
    "keys and values, by layer": dict(kv=(DISK, MIXED, HOST)),
}


def inputs(tokens: int = TOKENS, **extra) -> dict:
    ids = torch.randint(VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone(), **extra}


def assert_same_bits(model, plan: lt.Plan, offload: lt.Offload, call: dict) -> lt.Report:
    outcomes = []
    for each in (plan, replace(plan, offload=offload)):
        report = lt.apply(model, each)
        report.check_replay()
        for _ in range(2):  # a second step finds the tiers as the first one left them
            loss, grads = loss_and_grads(model, call)
        assert not report.store.names(), "extents were left behind"
        report.undo()
        outcomes.append((loss, {name: g.clone() for name, g in grads.items()}))
    (loss, grads), (offloaded_loss, offloaded_grads) = outcomes
    assert torch.equal(loss, offloaded_loss)
    for name in grads:
        assert torch.equal(grads[name], offloaded_grads[name]), name
    return report


@pytest.fixture
def tiers(disk):
    return dict(host_bytes=1 << 22, disk=lt.DiskSettings(path=disk, budget=1 << 23), staging_bytes=1 << 20)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("plan", [
    lt.Plan(chunk_tokens=16),
    lt.Plan(chunk_tokens=7, segment_layers=2, store_outputs=0.45, store_kv=0.7),
    lt.Plan(chunk_tokens=16, segment_layers=3, store_outputs=0.0, store_kv=1.0),
    lt.Plan(chunk_tokens=100, store_kv=1.0),
], ids=["outputs", "parts", "no outputs, keys and values", "one chunk"])  # fmt: skip
def test_gradients_have_the_same_bits_wherever_tensors_live(plan, placement, tiers):
    model = make_model(layers=3, window=(None, 13, 5))
    report = assert_same_bits(model, plan, lt.Offload(**PLACEMENTS[placement], **tiers), inputs())
    used = {name: tier.most for name, tier in report.store.regions.items()}
    wanted = {"all on disk": ["disk"], "all on the host": ["host"], "every tier": ["host", "disk"]}.get(placement, [])
    if plan.chunk_tokens < TOKENS:
        assert all(used[tier] > 0 for tier in wanted), used


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64])
def test_lengths_around_the_chunk(tokens, tiers):
    offload = lt.Offload(**PLACEMENTS["all on disk"], **tiers)
    assert_same_bits(make_model(layers=3, window=(None, 5, 5)), lt.Plan(chunk_tokens=16, store_kv=0.5), offload, inputs(tokens))


@pytest.mark.parametrize("store_kv", [(1.0, 0.0, 1.0), (0.3, 0.6, 1.0), (0.0, 1.0, 1.0)])
def test_layers_of_a_segment_behind_the_last_that_is_restored(store_kv, tiers):
    """All their keys and values are in the tiers, and they do not run in the restoring pass."""
    plan = lt.Plan(chunk_tokens=16, segment_layers=3, store_outputs=0.0, store_kv=store_kv)
    assert_same_bits(make_model(layers=3), plan, lt.Offload(kv=(HOST, MIXED, DISK), **tiers), inputs())


def test_packed_documents_and_dropout(tiers):
    call = inputs(cu_seqlens=torch.tensor([0, 20, 37, TOKENS], dtype=torch.int32))
    model = make_model(layers=3, attention_dropout=0.2)
    assert_same_bits(model, lt.Plan(chunk_tokens=9), lt.Offload(**PLACEMENTS["every tier"], **tiers), call)


def test_a_copied_model_uses_the_same_tiers_and_a_saved_one_is_refused(tiers):
    model, call = make_model(layers=3), inputs()
    report = lt.apply(model, lt.Plan(chunk_tokens=16, offload=lt.Offload(**PLACEMENTS["every tier"], **tiers)))
    loss, grads = loss_and_grads(model, call)
    copied_loss, copied = loss_and_grads(copy.deepcopy(model), call)
    assert torch.equal(loss, copied_loss) and all(torch.equal(copied[name], grads[name]) for name in grads)
    assert not report.store.names()
    with pytest.raises(TypeError, match=r"open tiers, which cannot be saved: save its state_dict\(\), or undo\(\) the report first"):
        torch.save(model, io.BytesIO())


def test_compressed_outputs_are_lossy_and_named(tiers):
    """FP8 is not the same bits: the gradients move, by less than its rounding does to one output."""
    model, plan, call = make_model(layers=3), lt.Plan(chunk_tokens=16), inputs()
    _, exact = loss_and_grads(model, call)
    exact = {name: g.clone() for name, g in exact.items()}
    lt.apply(model, replace(plan, offload=lt.Offload(outputs=lt.Split(compress=True), **tiers)))
    _, grads = loss_and_grads(model, call)
    errors = [float((grads[name] - exact[name]).norm() / exact[name].norm()) for name in exact]
    assert 1e-4 < max(errors) < 0.1


def test_two_pass_layers_and_tensor_boundaries(tiers):
    with pytest.raises(ValueError, match="boundaries"):
        lt.Plan(chunk_tokens=16, boundaries="tensor", offload=lt.Offload(inputs=HOST, **tiers))
    model = make_model(layers=3)
    assert_same_bits(model, lt.Plan(chunk_tokens=16, boundaries="tensor"), lt.Offload(outputs=DISK, **tiers), inputs())


@pytest.mark.parametrize("settings, match", [
    (dict(outputs=DISK), "offload.disk is not set"),
    (dict(outputs=HOST), "host_bytes is 0"),
])  # fmt: skip
def test_tiers_that_are_not_there_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        lt.Offload(**settings)


@pytest.mark.parametrize("shares", list(itertools.product([-0.1, 1.2], [0.0, 0.5])))
def test_shares_are_shares(shares):
    with pytest.raises(ValueError, match="shares from 0 to 1"):
        lt.Split(device=shares[0], host=shares[1])


def test_a_split_of_another_number_of_layers_is_refused(tiers):
    with pytest.raises(ValueError, match="offload.outputs names 2 layers, the model has 3"):
        lt.apply(make_model(layers=3), lt.Plan(chunk_tokens=16, offload=lt.Offload(outputs=(DISK, DISK), **tiers)))


class Listening(TieredStore):
    """Remembers what it was told, in order: (call, name, span)."""

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **settings)
        self.told: list[tuple[str, str, Span]] = []

    def prefetch(self, order, *, first=False):
        order = list(order)
        self.told += [("announce", str(name), span) for name, span in order]
        super().prefetch(order, first=first)

    def put(self, name, span, tensor, place=DEVICE):
        self.told.append(("put", str(name), span))
        super().put(name, span, tensor, place)

    def get(self, name, span):
        self.told.append(("get", str(name), span))
        return super().get(name, span)


@pytest.mark.parametrize("settings", [dict(), dict(store_kv=1.0), dict(segment_layers=2), dict(kv_block_tokens=32)])
def test_what_the_next_segment_begins_with_is_announced_before_this_one_ends(settings, tiers):
    model = make_model(layers=4, window=(None, 13, None, 5))
    offload = lt.Offload(**PLACEMENTS["all on disk"], **tiers)
    plan = lt.Plan(chunk_tokens=16, offload=offload, **settings)
    store = Listening("cpu", disk=offload.disk, staging_bytes=offload.staging_bytes)
    report = lt.apply(model, plan, store=store)
    loss_and_grads(model, inputs())
    first, last, k = Span(0, 16), Span(64, TOKENS), plan.segment_layers
    for layer in range(k, 4, k):
        at = lambda call, name, span, layer=layer: store.told.index((call, f"{name} {layer}", span))
        assert at("announce", "input of layer", first) < at("put", "input of layer", last)
        layer -= k
        backward = store.told[at("put", "gradient of the input of layer", last, layer + k):]
        kept = "store_kv" in settings or "kv_block_tokens" in settings and layer % 2 == 0  # else keys and values are restored first
        begins = last if kept else first
        announced = backward.index(("announce", f"input of layer {layer}", begins))
        assert announced < backward.index(("put", f"gradient of the input of layer {layer + k}", first))
    announced, asked = ([e[1:] for e in store.told if e[0] == call and "put of" in e[1]] for call in ("announce", "get"))
    assert Counter(announced) == Counter(asked)
    assert store._residence._fetched == 0 and not store._residence._order, "what was announced was never asked for"
    report.undo()
