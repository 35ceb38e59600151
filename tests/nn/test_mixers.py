"""Decoder layers with other mixers than attention: settings, names, initial values, and what a token can see through them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from longtrain.config import load_config
from longtrain.nn import DeltaNet, LaCT, LanguageModel, LinearAttention, ModelConfig
from longtrain.nn.decoder import MIXERS
from longtrain.train.flops import costs_of

SHAPE = dict(vocab_size=50, hidden_size=24, intermediate_size=32, num_heads=4, num_kv_heads=2, initializer_range=0.2)
KINDS = ("linear", "delta", "lact", "conv", "window", "attention")
SETTINGS = {"window": dict(window=(3,)), "lact": dict(lact_chunk=4), "conv": dict(conv_taps=5)}


def model(*layers: str, count: int | None = None) -> LanguageModel:
    settings = {name: value for kind in layers for name, value in SETTINGS.get(kind, {}).items()}
    return LanguageModel(ModelConfig(**SHAPE, num_layers=count or len(layers), layers=layers, **settings)).double()


def test_the_pattern_is_repeated_and_parameters_are_named_by_kind():
    names = {name.split(".")[3] for name, _ in model(*KINDS, count=8).named_parameters() if ".layers.6." in name or ".layers.7." in name}
    assert names == {"linear", "delta", "input_layernorm", "mlp", "post_attention_layernorm"}
    names = {name.rsplit(".", 1)[0] for name, _ in model("linear").named_parameters() if ".linear." in name}
    parts = {"q_proj", "k_proj", "v_proj", "decay_down", "decay_up", "output.norm", "output.gate_proj", "output.o_proj"}
    assert names == {f"model.layers.0.linear.{part}" for part in parts}
    assert set(MIXERS) == set(KINDS)


def test_window_layers_take_the_windows_in_turn():
    config = ModelConfig(**SHAPE, num_layers=7, layers=("window", "linear", "window", "attention"), window=(5, 9, 2))
    assert [config.layer_window(i) for i in range(7)] == [5, None, 9, None, 2, None, 5]
    assert [config.layer_kind(i) for i in range(5)] == ["window", "linear", "window", "attention", "window"]
    assert [layer.self_attn.window for layer in LanguageModel(config).model.layers if hasattr(layer, "self_attn")] == [5, 9, None, 2, 5]
    plain = ModelConfig(**SHAPE, num_layers=3, window=(5, None))
    assert [plain.layer_kind(i) for i in range(3)] == ["window", "attention", "window"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_see_what_is_before_them_in_their_document_alone(kind):
    m, ids = model(kind), torch.randint(50, (1, 20))
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 1) % 50
    differs = (m(ids).logits != m(changed).logits).any(-1)[0].tolist()
    sees = {"window": range(9, 12), "conv": range(9, 14), "lact": [9, *range(12, 20)]}.get(kind, range(9, 20))
    assert differs == [t in sees for t in range(20)]
    packed = m(ids, cu_seqlens=torch.tensor([0, 6, 7, 20])).logits
    alone = torch.cat([m(ids[:, a:b]).logits for a, b in [(0, 6), (6, 7), (7, 20)]], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-11, atol=1e-12)


def test_half_lives_begin_where_they_were_set():
    layer = LinearAttention(24, 3, 8, longest_half_life=1000)
    with torch.no_grad():
        decay = F.logsigmoid(layer.decay_up.bias).view(3, 8) / 16
    half_lives = math.log(0.5) / decay
    assert half_lives[1, 0] == pytest.approx(16, rel=1e-4) and half_lives[2, -1] == pytest.approx(1000, rel=1e-3)
    assert (half_lives.diff() > 0).all() and torch.equal(half_lives[0], half_lives[2])


@pytest.mark.parametrize("heads, expected", [(1, [4096]), (3, [4096, 256, 16])])
def test_delta_net_begins_with_long_memories(heads, expected):
    layer, seen = DeltaNet(24, heads, 4, longest_half_life=4096), []
    with torch.no_grad():
        layer.step_proj.weight.zero_()
        layer(torch.randn(1, 3, 24), None, lambda *inputs: inputs[0] if len(inputs) == 1 else seen.extend(inputs) or inputs[2])
    q, k, _, decay, beta = seen
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(1, 3, heads))
    torch.testing.assert_close(q.norm(dim=-1), torch.ones(1, 3, heads))
    assert (math.log(0.5) / decay[0, 2]).tolist() == pytest.approx(expected, rel=1e-4)
    assert (0 < beta).all() and (beta < 1).all()
    plain = DeltaNet(24, 4, 6, gated=False)
    assert plain.mixer()[1].tensors == ("k", "v", "beta") and not hasattr(plain, "step_proj")


def test_delta_net_s_queries_keys_and_values_pass_a_short_convolution():
    layer, x, seen = DeltaNet(24, 2, 4, short_taps=3), torch.randn(1, 7, 24), []
    short, rule = layer.mixer()
    assert short.filter.shape == (3 * 2 * 4, 3) and rule.delta
    layer(x, None, lambda *inputs: short(*inputs) if len(inputs) == 1 else seen.extend(inputs) or inputs[2])
    taps = (layer.short.filter.taps + F.pad(layer.short.skip[:, None], (0, 2)))[16:]  # of the values
    padded = F.pad(layer.v_proj(x), (0, 0, 2, 0))
    expected = F.silu(sum(taps[:, lag] * padded[:, 2 - lag : 9 - lag] for lag in range(3)))
    torch.testing.assert_close(seen[2].flatten(-2), expected)


def test_lact_begins_at_its_base_rate():
    layer, seen = LaCT(24, 4, 6, chunk_tokens=4, base_rate=0.02), []
    with torch.no_grad():
        layer.rate_proj.weight.zero_()
        layer(torch.randn(1, 3, 24), None, lambda q, k, v, rates: seen.append(rates) or v)
    torch.testing.assert_close(seen[0], torch.full((1, 3, 4, 3), 0.02))


@pytest.mark.parametrize("setting", [dict(chunk_tokens=0), dict(chunk_tokens=2.5), dict(momentum=1.0), dict(base_rate=0.0)])
def test_wrong_settings_of_lact(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        LaCT(24, 4, 6, **(dict(chunk_tokens=4) | setting))


@pytest.mark.parametrize("kind", ["linear", "delta", "lact"])
def test_every_parameter_learns(kind):
    m, ids = model(kind), torch.randint(50, (1, 20))
    m(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in m.parameters())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(layers=("atention",)), "model.layers must be a list of attention, window"),
        (dict(layers=()), "model.layers must be a list"),
        (dict(layers="conv"), "model.layers must be a list"),
        (dict(layers=("window",)), "model.layers names window layers and model.window is None"),
        (dict(layers=("window",), window=(4, None)), "full attention is the kind attention"),
        (dict(layers=("linear",), window=(4,)), "model.window has no effect"),
        (dict(layers=("linear",), conv_taps=4), "model.conv_taps has no effect: model.layers names no conv layer"),
        (dict(layers=("linear",), conv_squash=0.0), "model.conv_squash has no effect: model.layers names no conv layer"),
        (dict(layers=("conv",), conv_squash=0.01, conv_implicit=True), "model.conv_squash has no effect on filters of model.conv_implicit"),
        (dict(layers=("conv",), conv_squash=0.1), "model.conv_squash must be from 0 to 0.0883883, .* nearly all would be zero"),
        (dict(layers=("conv",), conv_squash=-0.1), "model.conv_squash must be from 0"),
        (dict(lact_chunk=4), "model.lact_chunk has no effect"),
        (dict(layers=("lact",), lact_chunk=0), "model.lact_chunk must be an integer"),
    ],
)
def test_wrong_layers_name_their_setting(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**SHAPE, num_layers=2, **changes)


def test_layers_in_yaml_and_their_errors_with_line_numbers(tmp_path):
    def load(model_lines, *overrides):
        file = tmp_path / "c.yaml"
        shape = "vocab_size: 256\n  num_layers: 4\n  hidden_size: 32\n  intermediate_size: 64\n  num_heads: 4\n  num_kv_heads: 2"
        rest = "data: {source: stdlib, seq_len: 64}\ntrain: {steps: 1, lr: 1e-3}\noutput: {dir: out}\n"
        file.write_text(f"model:\n  {shape}\n{model_lines}{rest}")
        return load_config(file, ["memory.chunk_tokens=16", *overrides])[0].model

    config = load("  layers: [conv, window, attention, linear]\n  window: [8]\n  conv_taps: 9\n")
    assert config.layers == ("conv", "window", "attention", "linear") and config.window == (8,) and config.conv_taps == 9
    config = load("  layers: [delta, conv]\n  conv_squash: 0.01\n", "train.filter_lr=1e-4")
    assert [layer.conv.filter.squash for layer in LanguageModel(config).model.layers if layer.mixer_name == "conv"] == [0.01, 0.01]
    load("  layers: [delta]\n", "train.filter_lr=1e-4")
    with pytest.raises(ValueError, match="train.filter_lr.*names no conv or delta layer"):
        load("  layers: [linear]\n", "train.filter_lr=1e-4")
    with pytest.raises(ValueError, match=r"c.yaml:9: model.conv_squash.*never train"):
        load("  layers: [conv]\n  conv_squash: 0.1\n")
    with pytest.raises(ValueError, match=r"c.yaml:8: model.layers\[1\].*windw"):
        load("  layers: [conv, windw]\n")
    with pytest.raises(ValueError, match=r"c.yaml:8: model.layers.*names window layers"):
        load("  layers: [conv, window]\n")


def test_flops_of_each_kind():
    """Heads of 6 features, 4 of them: linear attention reads and writes one matrix of each, the delta rule a third time."""
    of = {kind: costs_of(model(kind)) for kind in KINDS}
    assert of["attention"].attention == ((24, None),) and of["window"].attention == ((24, 3),)
    assert all(of[kind].attention == () for kind in ("linear", "delta", "lact", "conv"))
    base = 3 * 24 * 32 + 50 * 24  # MLP and head
    assert of["attention"].parameters == base + 2 * 24 * 6 * (4 + 2)
    assert of["delta"].parameters == base + 5 * 24 * 24 + 2 * 24 * 4 + 3 * 4 * 36
    assert of["linear"].parameters == base + 5 * 24 * 24 + 16 * 24 + 24 * 16 + 2 * 4 * 36
