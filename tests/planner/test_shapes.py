"""What is read of a config.json: MLPs of two matrices count as many parameters as they have."""

from __future__ import annotations

import json
import sys

import pytest

from longtrain.planner.shapes import find_shape

E, F = 64, 160
SHAPE = {"vocab_size": 96, "hidden_size": E, "intermediate_size": F, "num_hidden_layers": 3, "num_attention_heads": 4}


def shape_of(tmp_path, **more):
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, **more}))
    return find_shape(str(tmp_path))


@pytest.mark.parametrize(
    "family, activation, matrices",
    [("phi", "gelu_new", 2), ("gpt_neox", "gelu", 2), ("starcoder2", "gelu_pytorch_tanh", 2), ("gemma", "gelu_pytorch_tanh", 3)],
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_an_mlp_has_as_many_parameters_as_its_family_gives_it(family, activation, matrices, kv_heads, tmp_path):
    pytest.importorskip("transformers", reason='needs pip install "longtrain[hf]"')
    if family == "gpt_neox" and kv_heads == 2:
        pytest.skip("it has none of its own")
    found = shape_of(tmp_path, model_type=family, hidden_act=activation, num_key_value_heads=kv_heads, head_dim=E // 4)
    assert found.intermediate_size == round(matrices * F / 3) and found.num_layers == 3


def test_of_silu_nothing_has_to_be_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert shape_of(tmp_path, hidden_act="silu").intermediate_size == shape_of(tmp_path).intermediate_size == F
    with pytest.raises(ValueError, match=r"config.json: whether its MLPs .* pip install \"longtrain\[hf\]\""):
        shape_of(tmp_path, model_type="phi", hidden_act="gelu_new")


def test_a_family_that_there_is_not_is_said_in_a_line(tmp_path):
    pytest.importorskip("transformers", reason='needs pip install "longtrain[hf]"')
    for family in ({"model_type": "no such family"}, {}):
        with pytest.raises(ValueError, match="config.json: transformers makes no model of it") as refused:
            shape_of(tmp_path, hidden_act="relu", **family)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_layers_of_other_kinds_are_not_taken_for_attention(tmp_path):
    with pytest.raises(ValueError, match="has layers of kind conv, and is no plain decoder; plan it from a YAML file"):
        shape_of(tmp_path, layer_types=["full_attention", "conv", "full_attention"])
    found = shape_of(tmp_path, layer_types=["sliding_attention", "full_attention", "full_attention"], sliding_window=8)
    assert found.window == (8, None, None)


@pytest.mark.parametrize(
    "family, more, windows",
    [
        ("gemma2", {}, (8, None, 8)),
        ("gemma3_text", {"sliding_window_pattern": 2}, (8, None, 8)),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, (None, 8, 8)),
        ("qwen2", {"use_sliding_window": False}, None),
        ("mistral", {}, (8, 8, 8)),
    ],
)
def test_a_family_says_which_of_its_layers_have_the_window(family, more, windows, tmp_path):
    pytest.importorskip("transformers", reason='needs pip install "longtrain[hf]"')
    assert shape_of(tmp_path, model_type=family, sliding_window=8, **more).window == windows
