"""What a layer is said to compute and to hold is what it does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import longtrain as lt
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.planner import measure_model
from longtrain.planner.shapes import on_meta
from longtrain.stream.footprint import probe_layer
from longtrain.stream.loss import probe_loss, streamed_token_loss
from longtrain.stream.work import highest, lines
from tests.held import most_held

SHAPE = dict(vocab_size=512, num_layers=2, hidden_size=64, intermediate_size=160, num_heads=4, num_kv_heads=2)


def model(**changes) -> LanguageModel:
    return LanguageModel(ModelConfig(**{**SHAPE, **changes}))


def test_a_decoder_layer_computes_two_flops_a_weight_and_token_and_four_backward():
    layer = model().model.layers[0]
    weights = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
    found = probe_layer(layer)
    assert found.forward.flops == 2 * weights
    assert found.backward.flops == 4 * weights
    projections = sum(getattr(layer.self_attn, f"{name}_proj").weight.numel() for name in "qkv")
    assert found.to_mix.flops == 2 * projections
    assert dict(found.forward.products).keys() == {(32, 4), (64, 4)}  # K/V projections are 64 x 32
    assert found.forward.moved > 0 and found.forward.calls > 10


@pytest.mark.parametrize("changes", [{}, {"window": (100, None)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_alone_say_the_same(changes, dtype):
    config = ModelConfig(**{**SHAPE, **changes})
    real, shapes = measure_model(LanguageModel(config).to(dtype)), measure_model(on_meta(config, dtype))
    for a, b in zip(real.layers, shapes.layers, strict=True):
        for name in (
            "x",
            "output",
            "lse",
            "carry",
            "adjoint",
            "state",
            "graph_lines",
            "saved",
            "forward",
            "backward",
            "parameters",
            "causal",
        ):
            assert getattr(a, name) == getattr(b, name), name
    assert real.loss == shapes.loss and real.parameters == shapes.parameters


@pytest.mark.parametrize("tokens", [64, 512])
@pytest.mark.parametrize("segment_layers", [1, 2])
def test_what_a_chunk_holds_is_what_was_said(tokens, segment_layers):
    """The whole step in one chunk: what its highest moment holds beside what is stored, against the allocator's own count."""
    m = model()
    predicted = {
        p.name: p for p in lt.planner.step_memory(measure_model(m, 0), lt.Plan(chunk_tokens=tokens, segment_layers=segment_layers), tokens)
    }
    report = lt.apply(m, lt.Plan(chunk_tokens=tokens, segment_layers=segment_layers))
    ids = torch.randint(512, (1, tokens))
    measured = most_held(lambda: m(ids, labels=ids).loss.backward())
    report.undo()
    beside = {"parameters", "workspace"}
    most = max(sum(size for what, size in p.items.items() if what not in beside) for p in predicted.values())
    assert most == pytest.approx(measured, rel=0.05)


def test_what_the_loss_holds_is_what_was_said():
    norm, head = nn.RMSNorm(64), nn.Linear(64, 2048, bias=False)
    hidden, targets = torch.randn(1, 256, 64, requires_grad=True), torch.randint(2048, (1, 256))
    measured = most_held(lambda: streamed_token_loss(hidden, norm, head, targets, chunk_tokens=256))
    assert highest(probe_loss(norm, head)[0], 256) + head.weight.nbytes == pytest.approx(measured, rel=0.03)


def test_lines_decide_by_length():
    """One moment holds much whatever the chunk, another grows with it."""
    found = lines([[124, 240], [156, 560]], (24, 56))
    assert highest(found, 1) == 101 and highest(found, 100) == 1000
