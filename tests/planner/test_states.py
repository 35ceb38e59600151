"""What layers with a state of fixed size cost: footprint, what tiers hold of their entry states, workspace of their derivative."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import longtrain as lt
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.ops.state_mixers import LaCTMixer, LinearAttentionMixer
from longtrain.planner import measure_model, peak, step_memory
from longtrain.planner.tiers import tier_use
from longtrain.span import Span
from longtrain.stream.footprint import probe_layer
from tests.held import most_held

TOKENS = 1024


def model(layers: tuple[str, ...], **changes) -> LanguageModel:
    shape = dict(vocab_size=64, num_layers=len(layers), hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2)
    return LanguageModel(ModelConfig(**shape, layers=layers, **changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, state", [("linear", 4 * 16 * 16), ("lact", 4 * 9 * 16 * 16)])
def test_a_state_s_footprint_is_what_its_shape_says(kind, state, dtype):
    probe = probe_layer(model((kind,)).to(dtype).model.layers[0])
    assert probe.state == state * 4  # float32 whatever the layer's dtype
    assert (probe.carry, probe.adjoint, probe.lse) == (0, 0, 0)
    assert probe.output == 64 * dtype.itemsize
    assert probe.causal and len(probe.workspaces) == 1
    # k and v are held with q and the output, where attention's node holds q and the output alone
    assert probe.graph > probe_layer(model(("attention",)).to(dtype).model.layers[0]).graph


def test_memory_grows_by_a_state_a_chunk_and_the_workspace_is_a_chunk_s():
    footprint = measure_model(model(("linear",)))
    (layer,) = footprint.layers

    def items(tokens, chunk):
        return peak(step_memory(footprint, lt.Plan(chunk_tokens=chunk, store_outputs=0.0), tokens)).items

    for chunk in (128, 256):
        assert items(4096, chunk)["stored outputs and K/V"] == (4096 // chunk - 1) * layer.state
        assert items(4096, chunk)["graph of a chunk"] == round(
            max(layer.graph_bytes(chunk), layer.mixing_bytes(chunk)) + layer.output * chunk
        )
        assert items(4096, chunk)["K/V and their gradients"] == 0


@pytest.mark.parametrize("kv", [lt.Split(device=0.5, host=0.25, compress=True), lt.Split()])
@pytest.mark.parametrize("layers, segment_layers", [(("linear", "attention", "lact"), 1), (("linear", "lact"), 2)])
def test_what_a_tier_holds_and_is_written_is_what_was_predicted(layers, segment_layers, kv, disk):
    m = model(layers, lact_chunk=100)
    settings = lt.DiskSettings(path=disk, budget=1 << 26)
    offload = lt.Offload(outputs=lt.Split(device=0.25, host=0.25), kv=kv, host_bytes=1 << 24, disk=settings, staging_bytes=1 << 20)
    plan = lt.Plan(chunk_tokens=64, segment_layers=segment_layers, store_outputs=0.45, offload=offload)
    predicted = tier_use(measure_model(m), plan, TOKENS)
    report = lt.apply(m, plan)
    ids = torch.randint(64, (1, TOKENS))
    m(ids, labels=ids).loss.backward()
    for tier, use in predicted.items():
        assert report.store.regions[tier].most == pytest.approx(use.held, rel=0.05, abs=1 << 15), tier
        assert report.store.stats.written.get(tier, 0) == pytest.approx(use.written, rel=0.05, abs=1 << 15), tier
    assert predicted["disk"].written >= 3 * 4 * 9 * 16 * 16 * 4  # at least three entry states of the lact layer are among it
    report.undo()


@pytest.mark.parametrize("gated", [None, "head", "feature"])
@pytest.mark.parametrize("delta", [False, True])
def test_the_workspace_of_linear_attention_is_what_it_says(gated, delta):
    B, T, H, D = 1, 512, 2, 64
    inputs = [torch.randn(B, T, H, D), F.normalize(torch.randn(B, T, H, D), dim=-1), torch.randn(B, T, H, D)]
    inputs += [-torch.rand(B, T, H, *([D] if gated == "feature" else []))] if gated else []
    inputs += [torch.rand(B, T, H)] if delta else []
    mixer, state = LinearAttentionMixer(gated=gated is not None, delta=delta), torch.randn(B, H, D, D)
    dout, dstate = torch.randn(B, T, H, D), torch.randn(B, H, D, D)
    measured = most_held(lambda: mixer.step_vjp(Span(T, 2 * T), state, inputs, dout, dstate)) - sum(t.nbytes for t in inputs)
    assert 0.9 * measured <= mixer.workspace(*inputs[1:])(T) <= 1.3 * measured


@pytest.mark.parametrize("inner, chunk", [(64, 128), (128, 512), (32, 16)])
def test_the_workspace_of_test_time_training_is_what_it_says(inner, chunk):
    T, H, D = 512, 2, 64
    mixer = LaCTMixer(weights=torch.randn(H, 3, inner, D) / 8, chunk_tokens=chunk, momentum=0.5)
    inputs = [torch.randn(1, T, H, D) for _ in range(3)] + [0.01 * torch.rand(1, T, H, 3)]
    state = mixer.step(Span(0, T), None, *inputs)[1]
    dout, dstate = torch.randn(1, T, H, D), torch.randn_like(state)
    measured = most_held(lambda: mixer.step_vjp(Span(T, 2 * T), state, inputs, dout, dstate)) - sum(t.nbytes for t in inputs)
    assert 0.9 * measured <= mixer.workspace(*inputs[1:])(T) <= 1.3 * measured
