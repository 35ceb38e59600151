"""What leaves the device: chosen to fit the budget, and predicted to the byte's neighbourhood."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
import torch

import longtrain as lt
from longtrain.config import load_config
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.offload.system import System
from longtrain.offload.traffic import staging_rooms
from longtrain.planner import measure_model, peak, step_memory
from longtrain.planner.asked import Asked, held_beside_model
from longtrain.planner.cost import CPU_WORKSPACE, GPU_WORKSPACE, extents_bytes
from longtrain.planner.rates import usual_rates
from longtrain.planner.search import fastest_plan
from longtrain.planner.seconds import step_time
from longtrain.planner.smallest import smallest_plan, what_to_change
from longtrain.planner.tiers import describe, tier_use
from longtrain.train.schedule import step_count

TOKENS = 4096


def model(**changes) -> LanguageModel:
    shape = dict(vocab_size=64, num_layers=3, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2)
    return LanguageModel(ModelConfig(**{**shape, **changes}))


def least(footprint, tokens: int, tiers: lt.Offload | None) -> int:
    """Bytes of the smallest plan."""
    return smallest_plan(Asked(footprint, tokens, 1, tiers, usual_rates(footprint.device), 1))[1]


@pytest.fixture
def tiers(disk):
    return lt.Offload(disk=lt.DiskSettings(path=disk, budget=1 << 28), host_bytes=1 << 24, staging_bytes=1 << 20)


def drawn(seed: int, tiers: lt.Offload) -> tuple[LanguageModel, lt.Plan]:
    draw = random.Random(seed)
    m = model(num_layers=draw.randint(2, 5), window=draw.choice([None, (200,), (None, 300)]), num_kv_heads=draw.choice([1, 2, 4]))
    split = lambda: (lambda device: lt.Split(device=device, host=draw.choice([0.0, 0.5, 1.0]) * (1 - device)))(
        draw.choice([0.0, 0.25, 0.5])
    )
    offload = lt.Offload(
        inputs=split(), gradients=split(), outputs=split(), kv=split(), host_bytes=1 << 26, disk=tiers.disk, staging_bytes=1 << 20
    )
    k = draw.choice([1, 2])
    return m, lt.Plan(
        chunk_tokens=draw.choice([128, 256]), segment_layers=k, store_outputs=draw.choice([0.5, 1.0]), store_kv=draw.choice([0.0, 1.0]),
        offload=offload,
    )


@pytest.mark.parametrize("seed", range(10))
def test_what_a_tier_holds_and_is_written_is_what_was_predicted(seed, tiers):
    """Every extent, padding included; a released extent's space is free a little later, so the most that is held may be above."""
    compare(*drawn(seed, tiers))


def test_blocks_of_keys_and_values_too(tiers):
    """Sums that are asked for again while they are on their way are forwarded: they count as written, as the bytes do that the disk got."""
    m, plan = drawn(2, tiers)
    m = model(num_layers=2)
    compare(m, replace(plan, kv_block_tokens=1024, store_kv=0.0, offload=replace(plan.offload, kv=lt.Split(host=0.5))), written=False)


def test_time_is_of_the_bytes_that_blocks_move(tiers):
    """And of nothing that is restored, for all is kept."""
    plan = lt.Plan(chunk_tokens=128, kv_block_tokens=512, offload=lt.Offload(kv=lt.Split(host=1.0), host_bytes=1 << 30))
    footprint = measure_model(model())
    time = step_time(footprint, plan, TOKENS, 1, usual_rates(footprint.device))
    assert time.moved["host"][0] == pytest.approx(tier_use(footprint, plan, TOKENS)["host"].written, rel=0.05)
    assert time.moved["host"][1] > time.moved["host"][0] and time.parts["restored"] == 0
    assert step_time(footprint, replace(plan, kv_block_tokens=None), TOKENS, 1, usual_rates(footprint.device)).parts["restored"] > 0


def compare(m: LanguageModel, plan: lt.Plan, written: bool = True) -> None:
    predicted = tier_use(measure_model(m), plan, TOKENS)
    report = lt.apply(m, plan)
    ids = torch.randint(64, (1, TOKENS))
    m(ids, labels=ids).loss.backward()
    for tier, use in predicted.items():
        assert report.store.regions[tier].most == pytest.approx(use.held, rel=0.05, abs=1 << 16), tier
        assert not written or report.store.stats.written.get(tier, 0) == pytest.approx(use.written, rel=0.05, abs=1 << 16), tier
    report.undo()


@pytest.mark.parametrize("device", [0.0, 0.25])
def test_of_staging_counts_what_is_on_its_way(device, tiers):
    """What is fetched ahead fills its half; of what is written the chunk that was made last, where its tokens leave at all; a budget allows
    for more. The disk's slab is no tensor, and a GPU's is in host memory."""
    away = lt.Split(device=device)
    plan = lt.Plan(chunk_tokens=128, offload=replace(tiers, inputs=away, gradients=away, outputs=lt.Split()))
    footprint = measure_model(model())
    slab, half = staging_rooms(tiers.staging_bytes, True, System().threads)[1:]
    fast, slow = ({p.name: p.items for p in step_memory(footprint, plan, TOKENS, slow_tiers=slow)} for slow in (False, True))
    last, budget = (phases["backward of layers 2 to 2"] for phases in (fast, slow))
    assert last["staging"] == half + (0 if device else 128 * footprint.layers[0].x) and budget["staging"] == 2 * half
    assert last["workspace"] == CPU_WORKSPACE + slab + extents_bytes(footprint, plan, TOKENS)
    on_gpu = step_memory(replace(footprint, device=torch.device("cuda")), plan, TOKENS)
    assert all(p.items["workspace"] == GPU_WORKSPACE for p in on_gpu)
    report = lt.apply(model(), plan)
    assert report.store.staging == half
    report.undo()


def test_as_little_leaves_as_the_budget_asks(tiers):
    m = model()
    footprint = measure_model(m)
    without = least(footprint, TOKENS, None)
    smallest = least(footprint, TOKENS, tiers)
    taken = held_beside_model(footprint) + 2**22
    tight, loose = (lt.plan(m, TOKENS, room + taken, tiers=tiers) for room in (smallest + (without - smallest) // 8, 4 * without))
    assert loose.offload is None
    used = tier_use(footprint, tight, TOKENS)
    assert 0 < used["host"].held <= tiers.host_bytes and used["disk"].held <= tiers.disk.budget
    assert peak(step_memory(footprint, tight, TOKENS)).total <= tight.predicted_peak <= smallest + (without - smallest) // 8 + taken


def test_a_budget_that_a_disk_would_fit_says_so():
    m = model()
    footprint = measure_model(m)
    everything = lt.Offload(disk=lt.DiskSettings(path=".", budget=2**62))
    needed = least(footprint, 200_000, everything) + held_beside_model(footprint) + 2**24
    with pytest.raises(lt.InfeasibleBudget, match=r"memory\.disk \(of \d+ MiB\) or memory\.host_budget"):
        lt.plan(m, seq_len=200_000, budget=needed)


def test_a_wear_limit_is_respected(tmp_path):
    m = model()
    footprint = measure_model(m)
    disk = lt.DiskSettings(path=str(tmp_path), budget=1 << 30, max_written=1 << 16)
    tiers = lt.Offload(disk=disk, staging_bytes=1 << 20)
    without = least(footprint, TOKENS, None)
    with pytest.raises(lt.InfeasibleBudget):
        lt.plan(m, TOKENS, without - 2**21 + held_beside_model(footprint), tiers=tiers)


def test_a_disk_that_is_too_small_says_which_size_would_do(tmp_path):
    footprint = measure_model(model())

    def asked(budget: int, steps: int = 1, **limits) -> Asked:
        disk = lt.DiskSettings(path=str(tmp_path), budget=budget, **limits)
        return Asked(footprint, TOKENS, 1, lt.Offload(disk=disk, staging_bytes=1 << 20), usual_rates(footprint.device), steps)

    room = least(footprint, TOKENS, asked(1 << 40).tiers) + 2**20
    assert fastest_plan(asked(1 << 16), room) is None
    message = what_to_change(asked(1 << 16), room, 0)
    enough = int(re.search(r"memory\.disk\.budget to (\d+)MiB \(.* more\)", message)[1]) << 20
    assert fastest_plan(asked(enough), room).offload is not None
    worn = asked(1 << 40, steps=50, max_written=1 << 20)
    assert fastest_plan(worn, room) is None
    enough = int(re.search(r"max_written to (\d+)MiB \(50 steps\)", what_to_change(worn, room, 0))[1]) << 20
    assert fastest_plan(asked(1 << 40, steps=50, max_written=enough), room).offload is not None


def test_what_leaves_is_described_with_its_wear(tmp_path):
    disk = lt.DiskSettings(path=str(tmp_path), budget=1 << 28, max_written=10**9)
    by_layer = (lt.Split(device=1.0), lt.Split(), lt.Split())
    plan = lt.Plan(chunk_tokens=256, offload=lt.Offload(inputs=lt.Split(), outputs=by_layer, disk=disk, staging_bytes=1 << 20))
    footprint = measure_model(model())
    lines = describe(footprint, plan, TOKENS, steps=1000)
    written = tier_use(footprint, plan, TOKENS)["disk"].written
    assert any("outputs" in line and "0.00  1.00  layers 1 to 2" in line for line in lines)
    assert lines[-1].startswith(f"  disk wear  {written / 1e12:.4f} TB a step, {written / 1e9:.2f} TB in 1000 steps, of 0.00 TB allowed")
    assert f"reached after {10**9 // written} steps" in lines[-1]
    assert describe(footprint, lt.Plan(chunk_tokens=256), TOKENS) == []


def test_the_steps_of_a_run_are_counted_in_tokens():
    config, _ = load_config("configs/quickstart.yaml")
    stages, last = config.stages(), config.train.steps
    tokens = sum(s.tokens_per_update * (e - s.from_step) for s, e in zip(stages, [*(s.from_step for s in stages[1:]), last], strict=True))
    assert step_count(config) == -(-tokens // config.data.seq_len)
