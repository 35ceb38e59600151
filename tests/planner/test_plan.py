"""The planner: predictions against a measured step, and what it says when nothing fits."""

from __future__ import annotations

import re

import pytest
import torch

import longtrain as lt
from longtrain.commands.verify import two_passes
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.planner import measure_model, peak, step_memory
from longtrain.planner.asked import candidates
from longtrain.planner.cost import EXTENT, PAGE, extents_bytes
from longtrain.stream.footprint import probe_layer


def model(**changes) -> LanguageModel:
    shape = dict(vocab_size=64, num_layers=3, hidden_size=32, intermediate_size=96, num_heads=4, num_kv_heads=2)
    return LanguageModel(ModelConfig(**{**shape, **changes}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_decoder_layer_s_footprint_is_what_its_shape_says(dtype):
    layer = model().to(dtype).model.layers[0]
    probe, size, wide = probe_layer(layer), dtype.itemsize, max(dtype.itemsize, 4)
    assert probe.x == 32 * size
    assert probe.output == 32 * size + 4 * 4  # E elements and H float32 LSEs
    assert probe.carry == 2 * 2 * 8 * size
    assert probe.adjoint == 2 * 2 * 8 * wide
    assert probe.causal
    assert probe.parameters == sum(p.nbytes for p in layer.parameters())
    # gate, up, silu(gate), their product: F elements each; at least that is saved, and three gradients of F are held.
    assert probe.graph >= 7 * 96 * size


def test_probing_leaves_the_model_and_the_generator_alone():
    m = model(attention_dropout=0.1)
    before = torch.get_rng_state()
    measure_model(m)
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in m.parameters())


@pytest.mark.parametrize("seq_len", [3, 500, 5000])
def test_the_plan_fits_its_budget_and_a_larger_budget_stores_more(seq_len):
    m = model()
    footprint = measure_model(m)
    least = None
    for spare in (2**18, 2**22, 2**30):
        try:
            plan = lt.plan(m, seq_len=seq_len, budget=peak_of_smallest(m, seq_len) + spare)
        except lt.InfeasibleBudget:
            continue
        stored = sum(len(plan.stored_outputs(layer, seq_len)) for layer in range(len(m.model.layers)))
        assert least is None or (stored, plan.chunk_tokens) >= least or plan.chunk_tokens > least[1]
        least = stored, plan.chunk_tokens
        assert peak(step_memory(footprint, plan, seq_len)).total <= plan.predicted_peak
    assert least is not None


def peak_of_smallest(m: LanguageModel, seq_len: int) -> int:
    with pytest.raises(lt.InfeasibleBudget) as refusal:
        lt.plan(m, seq_len=seq_len, budget=1)
    return int(re.search(r"set the budget to (\d+)MiB", str(refusal.value))[1]) * 2**20


def test_an_infeasible_budget_names_changes_that_work():
    m, seq_len = model(), 400_000
    held = peak_of_smallest(m, 1)
    with pytest.raises(lt.InfeasibleBudget, match="the smallest needs") as refusal:
        lt.plan(m, seq_len=seq_len, budget=held + 2**27)
    message = str(refusal.value)
    budget = int(re.search(r"set the budget to (\d+)MiB", message)[1]) * 2**20
    shorter = int(re.search(r"sequence length to (\d+)", message)[1])
    assert 1 < shorter < seq_len
    # what this process holds may have grown by a little between the calls
    assert lt.plan(m, seq_len=seq_len, budget=budget + 2**24).predicted_peak <= budget + 2**24
    lt.plan(m, seq_len=shorter, budget=held + 2**27 + 2**24)


def test_a_budget_that_is_named_has_room_for_a_process_that_begins_with_a_little_more():
    with pytest.raises(lt.InfeasibleBudget) as refusal:
        lt.plan(model(), seq_len=4096, budget=1)
    needs, named = re.search(r"needs (\d+) MiB.*set the budget to (\d+)MiB", str(refusal.value)).groups()
    assert 7 <= int(named) - int(needs) <= 9


@pytest.mark.parametrize("budget", ["lots", "-3GiB", "0", "GiB", "3 parsecs", None, -1])
def test_budgets_that_are_none(budget):
    with pytest.raises(ValueError, match="budget"):
        lt.plan(model(), seq_len=100, budget=budget)


def test_lengths_that_are_none():
    with pytest.raises(ValueError, match="at least 1"):
        lt.plan(model(), seq_len=0, budget="1GiB")


@pytest.mark.parametrize("setting",
                         [{"seq_len": "512"}, {"seq_len": 512.0}, {"seq_len": 512, "batch": 1.5}, {"seq_len": 512, "steps": "3"}])
def test_numbers_that_are_none(setting):
    with pytest.raises(ValueError,
                       match=rf"{list(setting)[-1]} must be a whole number of at least 1, found {list(setting.values())[-1]!r}"):
        lt.plan(torch.nn.Linear(2, 2), budget="1GiB", **setting)


def test_a_model_without_layers():
    with pytest.raises(ValueError, match="no layers that can be streamed"):
        lt.plan(torch.nn.Linear(2, 2), seq_len=100, budget="1GiB")


def test_frozen_parameters_have_no_gradients_to_hold():
    m = model()
    whole = probe_layer(m.model.layers[0])
    m.model.layers[0].mlp.requires_grad_(False)
    frozen = probe_layer(m.model.layers[0])
    assert frozen.parameter_gradients < whole.parameter_gradients
    assert frozen.graph < whole.graph


@pytest.mark.parametrize(
    "taps, chunk, by_span", [(4, 128, True), (130, 128, False), (130, 129, True), (2000, 1024, False), (2000, 2048, True)]
)
def test_a_convolution_is_counted_as_it_streams_in_chunks_of_the_plan(taps, chunk, by_span):
    m = model(num_layers=2, layers=("conv", "attention"), conv_taps=taps)
    footprint = measure_model(m)
    conv, attention = footprint.at(chunk)
    assert conv.causal == by_span == (not two_passes(m.model.layers[0], chunk)) and attention.causal
    assert conv.carry == 32 * 4 * (1 if by_span else 3)  # v, or u and both gates
    tokens = 8 * chunk
    items = {phase.name: phase.items for phase in step_memory(footprint, lt.Plan(chunk_tokens=chunk), tokens)}["backward of layers 0 to 0"]
    held = conv.carry_tokens(tokens, chunk)
    assert (held < tokens) == by_span and items["K/V and their gradients"] >= conv.carry_bytes() * held
    assert {p.segment_layers for p in candidates(footprint, tokens) if p.chunk_tokens == chunk} <= ({1, 2} if by_span else {1})


def test_extents_take_memory_beside_their_tensors():
    """One of 4 KiB its records alone, one of 64 KiB a page too; windows keep keys and values chunk by chunk."""
    config = ModelConfig(vocab_size=64, num_layers=2, hidden_size=64, intermediate_size=64, num_heads=1, num_kv_heads=1, window=(64,))
    footprint = measure_model(LanguageModel(config))
    for chunk, inputs, kv in ((16, 0, 0), (256, PAGE, PAGE)):
        chunks = 1024 // chunk
        plan = lt.Plan(chunk_tokens=chunk, store_outputs=0.0, store_kv=1.0)
        assert extents_bytes(footprint, plan, 1024) == 2 * chunks * (EXTENT + inputs) + 2 * 2 * chunks * (EXTENT + kv)
