"""Mixers with a state of fixed size stream exactly: linear attention, the delta rule, large-chunk test-time training, and hybrids."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import longtrain as lt
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.offload import DiskSettings
from longtrain.ops.mixers import AttentionMixer
from longtrain.ops.state_mixers import LaCTMixer, LinearAttentionMixer
from longtrain.plan import Offload, Split
from longtrain.span import Layout, Span, whole_chunks
from longtrain.stream import causal
from tests.stream.conftest import VOCAB, assert_same, assert_streamed_equals_plain

pytestmark = pytest.mark.usefixtures("float64")

TOKENS = 70


def call(tokens: int = TOKENS, batch: int = 1, edges: tuple[int, ...] = ()) -> dict:
    ids = torch.randint(VOCAB, (batch, tokens))
    inputs = {"input_ids": ids, "labels": ids.clone()}
    return {**inputs, "cu_seqlens": torch.tensor([0, *edges, tokens], dtype=torch.int32)} if edges else inputs


FEATURES = {
    "linear": (dict(layers=("linear",)), call),
    "delta": (dict(layers=("delta",)), call),
    "lact": (dict(layers=("lact",), lact_chunk=11), call),
    "linear, documents": (dict(layers=("linear",)), lambda: call(edges=(3, 14, 31))),
    "delta, empty and one-token documents": (dict(layers=("delta",)), lambda: call(edges=(1, 1, 21, 22, 69))),
    "lact, documents": (dict(layers=("lact",), lact_chunk=7), lambda: call(edges=(1, 1, 14, 15, 49))),
    "lact, updates after every token": (dict(layers=("lact",), lact_chunk=1), lambda: call(tokens=23)),
    "delta, batch of three": (dict(layers=("delta",)), lambda: call(batch=3)),
    "lact, batch of two": (dict(layers=("lact",), lact_chunk=16), lambda: call(batch=2)),
    "linear, three tokens": (dict(layers=("linear",)), lambda: call(tokens=3)),
    "all kinds": (
        dict(layers=("conv", "window", "linear", "attention", "delta", "lact"), window=(9,), conv_taps=5, lact_chunk=10),
        lambda: call(edges=(20, 37)),
    ),
}


@pytest.mark.parametrize("chunk_tokens", [pytest.param(1, marks=pytest.mark.slow), 7, 64, TOKENS + 50])
@pytest.mark.parametrize("feature", FEATURES)
def test_every_chunk_size_and_feature(feature, chunk_tokens):
    changes, make_call = FEATURES[feature]
    assert_streamed_equals_plain(hybrid(**changes), lt.Plan(chunk_tokens=chunk_tokens), make_call())


@pytest.mark.parametrize("feature", ["linear, documents", "delta, empty and one-token documents", "lact, updates after every token"])
def test_one_token_at_a_time(feature, chunk_tokens=1):
    changes, make_call = FEATURES[feature]
    assert_streamed_equals_plain(hybrid(**changes), lt.Plan(chunk_tokens=chunk_tokens), make_call())


def hybrid(*, layers: tuple[str, ...], count: int | None = None, **changes):
    """One layer of each kind, or `count` of them."""
    shape = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_heads=4, num_kv_heads=2, initializer_range=0.2)
    return LanguageModel(ModelConfig(**shape, num_layers=count or max(2, len(layers)), layers=layers, **changes))


@pytest.mark.parametrize("boundaries", ["stream", "tensor"])
@pytest.mark.parametrize("segment_layers", [1, 2, 4])
@pytest.mark.parametrize("store_outputs, store_kv", [(1.0, 0.0), (0.0, 0.0), (0.45, 0.7), (0.0, 1.0)])
def test_segments_of_states_and_attention(segment_layers, store_outputs, store_kv, boundaries):
    """States keep their entry states while attention beside them restores its keys, and the other way about."""
    plan = lt.Plan(chunk_tokens=16, segment_layers=segment_layers, store_outputs=store_outputs, store_kv=store_kv, boundaries=boundaries)
    model = hybrid(layers=("linear", "attention", "lact", "window"), window=(13,), lact_chunk=12)
    assert_streamed_equals_plain(model, plan, call(edges=(20, 37)))


def test_states_beside_attention_in_blocks():
    plan = lt.Plan(chunk_tokens=16, segment_layers=2, store_outputs=0.45, kv_block_tokens=32)
    assert_streamed_equals_plain(hybrid(layers=("linear", "attention", "delta", "attention")), plan, call(edges=(20, 37)))


def test_a_layer_without_attention_is_never_run_to_restore():
    """Three runs of every chunk would be two and a replay: forward and replay are all that a state needs."""
    for layers, runs in ((("linear",), 2), (("attention",), 3)):
        model, spans = hybrid(layers=layers, count=1), -(-TOKENS // 16)
        seen = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(1))
        model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: seen.append(0))
        report = lt.apply(model, lt.Plan(chunk_tokens=16))
        seen.clear()
        model(**call()).loss.backward()
        assert seen.count(0) == runs * spans, layers
        report.undo()


def test_what_is_kept_of_a_state_does_not_grow_with_the_span(monkeypatch):
    """Bytes of the store between forward and backward, beside the layer's input: one state a chunk."""
    model = hybrid(layers=("delta",), count=1)
    report = lt.apply(model, lt.Plan(chunk_tokens=10, store_outputs=0.0))
    kept = {}
    backward = causal.backward

    def look(call, *args, **settings):
        for name in call.store.names():
            kept[str(name)] = [e.tensor.shape for e in call.store._extents[name].values()]
        return backward(call, *args, **settings)

    monkeypatch.setattr(causal, "backward", look)
    model(**call()).loss.backward()
    assert kept["layer 0 state"] == [(1, 1, 4, 6, 6)] * 6  # 7 chunks, the first begins with nothing
    assert not any("written" in name or "output" in name for name in kept)
    report.undo()


class Two(nn.Module):
    """Attention and the delta rule in one layer, on the same q, k, v."""

    token_args: dict[str, int] = {}

    def __init__(self, *mixers) -> None:
        super().__init__()
        self.before, self.beta, self.after = nn.Linear(12, 36), nn.Linear(12, 2), nn.Linear(12, 12)
        self._mixers = mixers

    def mixers(self):
        return self._mixers

    def example(self, tokens: int):
        return torch.randn(1, tokens, 12), {}

    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        first, second = (mix, mix) if mix is not None else self._mixers
        q, k, v = self.before(x).unflatten(-1, (2, -1)).chunk(3, dim=-1)
        x = x + self.after(first(q, k, v).flatten(-2)).tanh()
        k = F.normalize(k, dim=-1)
        return x + self.after(second(q, k, v, self.beta(x).sigmoid()).flatten(-2))


@pytest.mark.parametrize("attention", [AttentionMixer(), AttentionMixer(window_size=(4, 0)), AttentionMixer(causal=False)])
@pytest.mark.parametrize("store_outputs, store_kv", [(0.5, 0.6), (0.0, 0.0)])
def test_two_mixers_in_one_layer(attention, store_outputs, store_kv):
    """With one that looks ahead, the state mixes whole sequences, by head."""
    model = nn.Module()
    model.layers = nn.ModuleList([Two(attention, LinearAttentionMixer(delta=True))])
    x = torch.randn(2, 37, 12)

    def run():
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = model.layers[0](leaf)
        y.sin().sum().backward()
        return y.detach(), {"x": leaf.grad, **{n: p.grad.clone() for n, p in model.named_parameters()}}

    y, grads = run()
    lt.apply(model, lt.Plan(chunk_tokens=7, store_outputs=store_outputs, store_kv=store_kv))
    streamed_y, streamed = run()
    assert (streamed_y - y).norm() <= 1e-12 * y.norm()
    assert_same(streamed, grads)


def test_mixers_by_group_are_the_whole():
    q, k, v = (torch.randn(2, 9, 3, 4) for _ in range(3))
    mixers = [
        (LinearAttentionMixer(gated=True), (q, k, v, -torch.rand(2, 9, 3, 4))),
        (LaCTMixer(weights=torch.randn(3, 3, 5, 4), chunk_tokens=4), (q, k, v, torch.rand(2, 9, 3, 3))),
    ]
    for mixer, inputs in mixers:
        whole = mixer(*inputs)
        for heads, part, part_inputs in mixer.by_group(*inputs):
            torch.testing.assert_close(part(*part_inputs), whole[:, :, heads])


@pytest.mark.parametrize("frozen", ["weights", "rate_proj", "lact", "decay_up", "linear", "layers.0"])
def test_frozen_weights_get_no_gradient_and_change_none(frozen):
    model = hybrid(layers=("linear", "lact"), lact_chunk=9)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    assert_streamed_equals_plain(model, lt.Plan(chunk_tokens=16, segment_layers=2), call())


@pytest.mark.parametrize("kind, trained, settings", [
    ("conv", "filter.taps", dict(conv_taps=7)), ("conv", "skip", dict(conv_taps=7)), ("conv", "filter", dict(conv_implicit=True)),
    ("lact", "weights", dict(lact_chunk=9)),
])
def test_what_mixers_are_made_of_is_trained_alone(kind, trained, settings):
    """In the first layer, whose input wants no gradient."""
    model = hybrid(layers=(kind, "attention"), **settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(f"model.layers.0.{kind}.{trained}"))
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert_streamed_equals_plain(model, lt.Plan(chunk_tokens=16), call())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_replays_give_the_forward_s_bits_in_training_dtypes(dtype):
    model = hybrid(layers=("linear", "delta", "lact"), lact_chunk=9).to(dtype)
    report = lt.apply(model, lt.Plan(chunk_tokens=16, store_outputs=0.4))
    report.check_replay()
    model(**call()).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in model.parameters())


def test_without_gradients_nothing_is_kept():
    model = hybrid(layers=("linear", "lact"), lact_chunk=9)
    inputs = call()
    plain = model(**inputs).loss.detach()
    report = lt.apply(model, lt.Plan(chunk_tokens=16))
    with torch.no_grad():
        assert abs(model(**inputs).loss - plain) <= 1e-12 * plain
    assert report._chains[0].store.names() == []


def test_entry_states_go_where_keys_and_values_go(disk):
    """To the host and to disk, never compressed, with the same bits."""
    model, inputs = hybrid(layers=("linear", "lact"), lact_chunk=9), call()

    def grads(plan):
        report = lt.apply(model, plan)
        model.zero_grad()
        model(**inputs).loss.backward()
        stats = getattr(report.store, "stats", None)
        report.undo()
        return {n: p.grad.clone() for n, p in model.named_parameters()}, stats

    here, _ = grads(lt.Plan(chunk_tokens=8, store_outputs=0.0))
    away = Offload(kv=Split(device=0.2, host=0.4, compress=True), host_bytes=2**22, disk=DiskSettings(path=disk, budget=2**22))
    there, stats = grads(lt.Plan(chunk_tokens=8, store_outputs=0.0, offload=away))
    assert all(torch.equal(here[n], there[n]) for n in here)
    assert stats.written["disk"] > 0 and stats.written["host"] > 0


def test_whole_chunks():
    assert whole_chunks(Span(0, 50), 16) == Span(0, 50)
    assert whole_chunks(Span(17, 50), 16) == Span(32, 50)
    assert whole_chunks(Span(49, 50), 16) == Span(50, 50)
    assert whole_chunks(Span(50, 50), 16) == Span(50, 50)


def test_fast_weights_are_those_of_each_document_alone():
    layout = Layout.make(30, (0, 13, 30))
    mixer = LaCTMixer(weights=torch.randn(2, 3, 5, 4), chunk_tokens=4, momentum=0.5)
    inputs = [torch.randn(1, 30, 2, 4) for _ in range(3)] + [torch.rand(1, 30, 2, 3)]
    packed = LaCTMixer(weights=mixer.weights, chunk_tokens=4, momentum=0.5, documents=layout)(*inputs)
    alone = torch.cat([mixer(*(t[:, a:b] for t in inputs)) for a, b in ((0, 13), (13, 30))], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-13, atol=1e-13)
