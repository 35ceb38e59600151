"""`memory.budget` of several processes: the plan is made for what one of them has. No process is started here."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from longtrain.config import ConfigError, load_config
from longtrain.train import budget
from longtrain.train.budget import make_plan
from longtrain.train.distribute import Work
from longtrain.train.model import build_model

HELD = 300 * 2**20
"""What each process is said to hold already."""


@pytest.fixture
def plan_of(config_file, monkeypatch):
    """``plan_of(budget, context, data)``: the plan of `context` processes that share each sequence, in `data` groups that share the
    weights."""
    monkeypatch.setattr(budget, "held_beside_model", lambda model: HELD)

    def make(size: str, context: int = 1, data: int = 1):
        settings = ["data.seq_len=8192", "model.hidden_size=64", "model.intermediate_size=128", f"memory.budget={size}"]
        config, where = load_config(config_file, settings)
        model, *_ = build_model(config, where)
        mesh = SimpleNamespace(device_type="cpu")
        return make_plan(model, config, where, replace(Work(), mesh=mesh, kept=context * data, data=data, context=context))

    return make


def test_what_is_held_and_planned_keeps_to_the_budget_and_chunks_are_of_whole_sequences(plan_of):
    plan = plan_of("600MiB", context=4)
    assert HELD < plan.predicted_peak <= 600 * 2**20
    assert plan.chunk_tokens % 4 == 0 and plan.chunk_tokens >= 4 * 128
    assert plan_of("600MiB", context=4) == plan


@pytest.mark.parametrize("share", [{"context": 8}, {"data": 8}], ids=str)
def test_each_of_several_needs_less_than_one_by_itself(share, plan_of):
    needed = {}
    for name, asked in (("alone", {}), ("share", share)):
        with pytest.raises(ConfigError, match=r"memory.budget: each of 1 processes: no plan for 1 x \d+ tokens fits 320 MiB") as refused:
            plan_of("320MiB", **asked)
        needed[name] = int(re.search(r"set the budget to (\d+)MiB", str(refused.value))[1])
        assert plan_of(f"{needed[name]}MiB", **asked).predicted_peak <= needed[name] * 2**20
    assert needed["share"] < needed["alone"]
