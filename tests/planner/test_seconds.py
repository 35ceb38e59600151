"""Step time: the formulas by hand, what transfers expose, what a machine's profile says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import longtrain as lt
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.planner import calibrate, measure, measure_model, measure_steps
from longtrain.planner.machines import MACHINES, find_machine
from longtrain.planner.rates import Rates
from longtrain.planner.seconds import attention_flops, step_time

TOKENS, E, F, H, K, D, V, L = 4096, 64, 96, 4, 2, 16, 64, 3
ONLY_FLOPS = Rates(flops=1e9, host_write=1e12, host_read=1e12, disk_write=1e12, disk_read=1e12)


@pytest.fixture(scope="module")
def footprint():
    return measure_model(
        LanguageModel(ModelConfig(vocab_size=V, num_layers=L, hidden_size=E, intermediate_size=F, num_heads=H, num_kv_heads=K))
    )


def by_hand(b: float, restored: float) -> float:
    """FLOP of a step."""
    A = 4 * H * D * TOKENS * (TOKENS + 1) / 2
    projections = E * (H + 2 * K) * D
    N = 2 * TOKENS * (projections + E * H * D + 3 * E * F)
    return L * ((3.5 + (1 - b) ** 2) * A + 4 * N + restored * 2 * TOKENS * projections) + 6 * E * V * TOKENS


@pytest.mark.parametrize("outputs, kv", [(1.0, 1.0), (0.5, 1.0), (0.0, 0.0), (1.0, 0.0)])
def test_without_other_rates_time_is_flops(footprint, outputs, kv):
    plan = lt.Plan(chunk_tokens=512, store_outputs=outputs, store_kv=kv)
    found = step_time(footprint, plan, TOKENS, 1, ONLY_FLOPS, optimizer="none")
    assert found.total == pytest.approx(by_hand(outputs, 1 - kv) / 1e9, rel=1e-6)
    assert found.done_flops == pytest.approx(by_hand(outputs, 0), rel=1e-6)


def test_segments_restore_the_layers_before_the_last(footprint):
    alone, three = (
        step_time(footprint, lt.Plan(chunk_tokens=512, segment_layers=k), TOKENS, 1, ONLY_FLOPS, optimizer="none").total for k in (1, 3)
    )
    projections, N = 2 * TOKENS * E * (H + 2 * K) * D, 2 * TOKENS * (E * (H + 2 * K) * D + E * H * D + 3 * E * F)
    assert three - alone == pytest.approx(2 * (N - projections) / 1e9, rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 100, TOKENS, 1 << 16])
def test_a_window_costs_the_pairs_that_it_lets_see(tokens):
    config = ModelConfig(
        vocab_size=V, num_layers=1, hidden_size=E, intermediate_size=F, num_heads=H, num_kv_heads=K, head_dim=D, window=(256,)
    )
    footprint = measure_model(LanguageModel(config))
    found = attention_flops(footprint.layers[0], footprint, tokens) / (4 * H * D)
    assert found == pytest.approx(sum(min(t + 1, 256) for t in range(tokens)), rel=1e-3)


def test_a_step_is_slower_than_its_parts_by_the_size_of_its_hidden_states(footprint):
    slow = replace(ONLY_FLOPS, moved=1e9, launch=1e-5, made=((1, 1e9),), operations=(("aten::add", 1e8),))
    slow = replace(slow, slower=((1 << 16, 2.0), (1 << 18, 4.0)))
    twice = replace(slow, slower=(), moved=5e8, launch=2e-5, made=((1, 5e8),), operations=(("aten::add", 5e7),))
    assert slow.in_step(1) == slow.in_step(1 << 16) == twice and slow.in_step(1 << 17).launch == pytest.approx(3e-5)
    narrow = (1 << 16) // (4 * E)
    small, by_hand = (step_time(footprint, lt.Plan(chunk_tokens=narrow), TOKENS, 1, rates).total for rates in (slow, twice))
    assert small == by_hand


def test_small_chunks_cost_launches_and_sums_of_gradients(footprint):
    rates = replace(ONLY_FLOPS, launch=1e-5, moved=1e9)
    few, many = (step_time(footprint, lt.Plan(chunk_tokens=c), TOKENS, 1, rates).total for c in (1024, 128))
    layer = footprint.layers[0]
    calls = layer.to_mix.calls + 2 * layer.forward.calls + layer.backward.calls
    fixed = sum(c for work in (layer.to_mix, layer.forward, layer.forward, layer.backward) for _, (_, c) in work.others)
    loss = footprint.loss_work.calls * 1e-5 + sum(c for _, (_, c) in footprint.loss_work.others) / 1e9
    of_a_layer = calls * 1e-5 + (3 * layer.parameter_gradients + fixed) / 1e9
    assert many - few == pytest.approx(28 * (L * of_a_layer + loss), rel=1e-6)


def mixing(kind: str, chunk: int, **changes) -> float:
    """FLOP of what is there in attention's place, at 1 FLOP/s, of a step that stores no output."""
    config = ModelConfig(
        vocab_size=V, num_layers=2, hidden_size=E, intermediate_size=F, num_heads=H, num_kv_heads=K, layers=(kind,), **changes
    )
    plan = lt.Plan(chunk_tokens=chunk, store_outputs=0.0)
    parts = step_time(measure_model(LanguageModel(config)), plan, TOKENS, 1, replace(ONLY_FLOPS, flops=1.0), optimizer="none").parts
    assert parts["attention"] == 0
    return (parts["other mixers"] + parts["mixed again"]) / 2


def test_other_mixers_cost_what_they_say():
    """Forward, again, backward: linear attention 1 + 1 + 3, test-time training likewise, convolutions 1 + 1 + 2 or by transforms."""
    forward = 64 * 2 * D + 4 * D * D
    assert mixing("linear", 512) == pytest.approx(5 * TOKENS * H * forward)
    delta, short = 2 * 64 * 2 * D + 6 * D * D, 2 * 3 * H * D * 4
    assert mixing("delta", 512) == pytest.approx(TOKENS * (5 * H * delta + 4 * short))
    assert mixing("lact", 512, lact_chunk=256) == pytest.approx(5 * TOKENS * H * 18 * D * D)
    assert mixing("conv", 512, conv_taps=4) == pytest.approx(4 * TOKENS * E * 2 * 4)
    one, pieces = 5 * 1024 * 11, TOKENS // 1024  # 1,024 taps reach back further than a chunk: the whole sequence, by transforms
    assert mixing("conv", 512, conv_taps=1024) == pytest.approx(E * one * (2 * (2 * pieces + 1) + 3 * pieces + 2))


def test_new_memory_costs_by_the_size_of_its_blocks(footprint):
    free = replace(ONLY_FLOPS, made=((1, 1e30),))
    dear = replace(ONLY_FLOPS, made=((1 << 14, 1e30), (1 << 14 | 1, 1e6)))
    of = lambda chunk, rates: step_time(footprint, lt.Plan(chunk_tokens=chunk), TOKENS, 1, rates).total
    spent = {chunk: of(chunk, dear) - of(chunk, free) for chunk in (16, 512)}
    work = footprint.layers[0].forward
    assert sum(count for _, count in work.made) > 10 and all(slope >= 0 for (slope, _), _ in work.made)
    assert spent[16] < spent[512]  # blocks of 16 tokens are small ones, but for the gradients of the weights


def test_transfers_cost_what_compute_does_not_hide(footprint, tmp_path):
    disk = lt.DiskSettings(path=str(tmp_path), budget=1 << 30)
    plan = lt.Plan(chunk_tokens=512, offload=lt.Offload(inputs=lt.Split(), outputs=lt.Split(), disk=disk))
    fast, slow = (step_time(footprint, plan, TOKENS, 1, replace(ONLY_FLOPS, disk_write=r, disk_read=r)) for r in (1e12, 1e3))
    assert fast.parts["exposed transfers"] == 0
    moved = L * TOKENS * (footprint.layers[0].x + footprint.layers[0].output)
    assert slow.moved["disk"][0] == pytest.approx(moved)
    assert slow.moved["disk"][1] == pytest.approx(moved + 2 * L * TOKENS * footprint.layers[0].x)  # forward, restoring, backward
    compute = slow.total - slow.parts["exposed transfers"] - slow.parts["loss"] - slow.parts["optimizer"]
    assert slow.parts["exposed transfers"] == pytest.approx(sum(slow.moved["disk"]) / 1e3 - compute, rel=1e-3)


def test_a_rate_between_two_sizes_lies_between_theirs():
    rates = replace(ONLY_FLOPS, products=((64, 1.0), (1024, 5.0)))
    assert [rates.at(rates.products, size) for size in (1, 64, 256, 1024, 9999)] == [1.0, 1.0, 3.0, 5.0, 5.0]


def test_machines_name_their_sources_and_rates():
    assert {"a100", "h100", "h200", "b200", "rtx4090", "rtx5090"} <= MACHINES.keys()
    for machine in MACHINES.values():
        assert "datasheet" in machine.source or "whitepaper" in machine.source
        assert machine.rates.flops < machine.peak_flops and machine.memory > 20e9


def test_what_calibration_writes_is_what_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "MOVED", 1 << 22)
    monkeypatch.setattr(measure_steps, "ROUNDS", 1)
    monkeypatch.setattr(measure_steps, "EXTENT", 1 << 12)
    monkeypatch.setitem(
        calibrate.SHAPES, "cpu", {"rows": 64, "width": 64, "sizes": (16, 32), "tokens": 64, "heads": 4, "dims": (16,), "elements": 1 << 12}
    )
    said = []
    machine = calibrate.calibrate(torch.device("cpu"), torch.float32, tmp_path, say=said.append, name="here")
    machine.save(tmp_path / "machine.json")
    assert find_machine(str(tmp_path / "machine.json")) == machine
    assert len(said) >= 10 and machine.rates.launch > 0
    assert not list(tmp_path.glob("tmp*"))


@pytest.mark.parametrize(
    "device, problem", [("h101", "no machine that is known (a100"), ("{}", "no profile of a machine"), ("nonsense", "no profile")]
)
def test_devices_that_are_none(tmp_path, device, problem):
    if device != "h101":
        (tmp_path / "machine.json").write_text(device)
        device = str(tmp_path / "machine.json")
    with pytest.raises(ValueError, match=problem.replace("(", r"\(")):
        find_machine(device)
