"""What is said of models of transformers: windows are seen, which no tiny example shows."""

from __future__ import annotations

import pytest
import torch

import longtrain as lt
from longtrain.planner import measure_model, peak, step_memory
from tests.held import most_held

transformers = pytest.importorskip("transformers", reason='needs pip install "longtrain[hf]"')
SHAPE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    max_position_embeddings=4096, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "mistral": (dict(sliding_window=100), (99, 99, 99)),
    "gemma3_text": (dict(sliding_window=100, layer_types=KINDS, query_pre_attn_scalar=16), (99, -1, 99)),
    "llama": ({}, (-1, -1, -1)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_are_seen_layer_by_layer(family):
    changes, windows = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **SHAPE, **changes))
    ids = torch.arange(12)[None]
    before, state = model(input_ids=ids).logits, torch.get_rng_state()
    footprint = measure_model(model)
    assert tuple(layer.mixers[0].window_size[0] for layer in footprint.layers) == windows
    assert torch.equal(model(input_ids=ids).logits, before) and torch.equal(torch.get_rng_state(), state)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_a_windowed_model_holds_is_what_was_said():
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("mistral", **SHAPE, **FAMILIES["mistral"][0])
    model, plan, tokens = transformers.AutoModelForCausalLM.from_config(config), lt.Plan(chunk_tokens=64, store_kv=0.0), 2048
    top = peak(step_memory(measure_model(model, 0), plan, tokens))
    report = lt.apply(model, plan)
    ids = torch.randint(64, (1, tokens))
    measured = most_held(lambda: model(input_ids=ids, labels=ids).loss.backward())
    report.undo()
    predicted = top.total - top.items["workspace"] - top.items["parameters"]
    assert predicted == pytest.approx(measured, rel=0.05)
