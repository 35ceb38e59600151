"""The greedy choice of what is stored where: within its budgets, near the exact least time, and never a transfer dearer than computing."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

import longtrain as lt
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.planner import measure_model, peak, step_memory
from longtrain.planner.asked import Asked
from longtrain.planner.placement import Option, Problem, choose, step_seconds
from longtrain.planner.rates import Rates
from longtrain.planner.search import _problem, fastest_plan
from longtrain.planner.seconds import layer_seconds
from longtrain.planner.smallest import _least, smallest_plan
from longtrain.planner.tiers import tier_use

TOKENS = 8192
FAST = Rates(flops=1e9, host_write=1e12, host_read=1e12, disk_write=1e12, disk_read=1e12)
"""Any transfer hides behind compute."""

SLOW = Rates(flops=1e14, host_write=1e6, host_read=1e6, disk_write=1e5, disk_read=1e5)
"""Computing again is always quicker."""


def model(**changes) -> LanguageModel:
    shape = dict(vocab_size=64, num_layers=3, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2)
    return LanguageModel(ModelConfig(**{**shape, **changes}))


def tiers(path: str = "/", **changes) -> lt.Offload:
    settings = dict(budget=1 << 30) | changes
    return lt.Offload(disk=lt.DiskSettings(path=path, **settings), host_bytes=1 << 22, staging_bytes=1 << 20)


def drawn_problem(seed: int) -> Problem:
    """A model of two or three layers, and a budget between what it needs at least and what it would like."""
    draw = random.Random(seed)
    footprint = measure_model(model(num_layers=draw.choice([2, 3]), window=draw.choice([None, (500,), (None, 300)])))
    speed = 10 ** draw.uniform(7, 10)
    rates = Rates(flops=10 ** draw.uniform(9, 11), host_write=4 * speed, host_read=4 * speed, disk_write=speed, disk_read=0.7 * speed)
    limits = draw.choice([{}, dict(budget=3 << 20), dict(max_written=6 << 20)])
    asked = Asked(footprint, TOKENS, 1, draw.choice([None, tiers(**limits)]), rates, draw.choice([1, 2]))
    candidate = lt.Plan(chunk_tokens=512, store_outputs=0.0)
    most = asked.peak(lt.Plan(chunk_tokens=512))
    least = asked.peak(_least(asked, candidate))
    return _problem(asked, candidate, int(least + draw.uniform(0.05, 0.9) * max(0, most - least)))


def within(problem: Problem, choice: list[int]) -> bool:
    used = sum(options[i].uses for options, i in zip(problem.items, choice, strict=True))
    return bool((used <= problem.budgets + 1).all())


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(100, 300), marks=pytest.mark.slow)], ids=["few", "many"])
def test_the_greedy_choice_is_near_the_exact_one(seeds):
    pytest.importorskip("scipy", reason="the planner was NOT compared with an exact solution: pip install 'longtrain[dev]' for scipy")
    from tests.planner.exact import least_seconds

    ratios, missed = [], 0
    for seed in seeds:
        problem = drawn_problem(seed)
        choice, least = choose(problem), least_seconds(problem)
        if choice is None:
            missed += least is not None
            continue
        assert within(problem, choice)
        ratios.append(step_seconds(problem, choice) / least)
    found = f"mean {np.mean(ratios):.4f}, worst {max(ratios):.4f} of the exact least"
    print(f"\n{len(ratios)} problems: {found}; {missed} feasible ones missed")
    assert min(ratios) >= 1 - 1e-5, "better than the exact solution: one of the two is wrong"
    assert np.mean(ratios) <= 1.02 and max(ratios) <= 1.15 and missed <= len(ratios) // 50


def option(uses: list[float], compute: float = 0.0, transfer: float = 0.0) -> Option:
    return Option(value=None, uses=np.array(uses, float), compute=np.array([compute]), transfer=np.array([transfer]))


def test_a_transfer_that_is_slower_than_computing_again_is_not_chosen():
    for transfer, expected in ((3.0, 1), (0.5, 2)):
        keep, recompute, move = option([10, 0]), option([0, 0], compute=1.0), option([0, 10], transfer=1 + transfer)
        problem = Problem(items=[[keep, recompute, move]], budgets=np.array([5.0, 100.0]), compute=np.array([1.0]))
        assert choose(problem) == [expected]


def test_nothing_that_fits_is_none():
    problem = Problem(items=[[option([10]), option([8], transfer=1.0)]], budgets=np.array([5.0]), compute=np.array([1.0]))
    assert choose(problem) is None


def plan_at(share: float, rates: Rates, offered: lt.Offload | None, **settings) -> tuple[lt.Plan, Asked]:
    """The planner's plan for a budget that is `share` of the way from the least to the most."""

    asked = Asked(measure_model(model(**settings)), TOKENS, 1, offered, rates, 1)
    least, most = smallest_plan(replace(asked, tiers=None))[1], asked.peak(lt.Plan(chunk_tokens=4096))
    room = int(least + share * (most - least)) + (offered.staging_bytes if offered else 0)
    found = fastest_plan(asked, room)
    assert peak(step_memory(asked.model, found, TOKENS)).total <= room
    return found, asked


def test_outputs_leave_where_the_tiers_are_fast_and_are_computed_again_where_they_are_slow():
    fast, asked = plan_at(0.15, FAST, tiers())
    assert fast.offload is not None and fast.store_outputs == 1.0
    assert 0 < tier_use(asked.model, fast, TOKENS)["host"].held <= 1 << 22
    slow, _ = plan_at(0.15, SLOW, tiers())
    assert slow.offload is None


def test_layers_may_differ():
    """A window's outputs are cheap to compute again; those of the layer that sees everything are kept."""
    found, _ = plan_at(0.2, SLOW, None, num_layers=4, window=(None, 64, 64, 64))
    full, *windowed = found.store_outputs
    assert full > max(windowed)


def test_the_wear_limit_is_of_the_run():
    footprint = measure_model(model())
    one, ten = (Asked(footprint, TOKENS, 1, tiers(max_written=1 << 22), FAST, steps) for steps in (1, 10))
    assert one.may_write == 10 * ten.may_write
    with pytest.raises(lt.InfeasibleBudget, match=r"the smallest needs .* more .*set the budget to \d+MiB"):
        lt.plan(model(), TOKENS, 1 << 20, tiers=tiers(max_written=1 << 22), steps=1000)


@pytest.mark.parametrize("rate", ["flops", "disk_read"])
def test_rates_are_above_zero(rate):
    with pytest.raises(ValueError, match=f"rates.{rate} must be above 0"):
        Rates(**{**dict(flops=1.0, host_write=1.0, host_read=1.0, disk_write=1.0, disk_read=1.0), rate: 0.0})


def test_attention_of_a_window_takes_less_time():
    m = measure_model(model(num_layers=2, window=(None, 64)))
    full, windowed = layer_seconds(m, TOKENS, 1, 512, FAST)
    assert full.forward > 2 * windowed.forward
