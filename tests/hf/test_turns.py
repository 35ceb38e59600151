"""Hybrid models whose sequences several processes share: states go from process to process, loss and gradients are those of the family's
own code in one process, in float64."""

from __future__ import annotations

import hf_families
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

import longtrain as lt
from tests.hf.test_shared import PACKED, batch, gradients
from tests.processes import run_ranks

EXACT = 1e-12
TOKENS = 57
CALLS = {"one row": batch, "two rows": lambda: batch(rows=2), "packed": lambda: batch(packed=True)}
WAYS = {
    "contiguous": lt.Parallel(),
    "zigzag": lt.Parallel(layout="zigzag"),
    "striped, no heads": lt.Parallel(layout="striped", stripe=2, heads=1, way="queries"),
    "ring": lt.Parallel(heads=1, way="ring"),
}
FAMILIES = ("lfm2", "qwen3_next", "qwen3_5_text", "olmo_hybrid", "bamba", "granitemoehybrid", "nemotron_h", "mamba2", "lfm2_moe")


class InDouble(TorchFunctionMode):
    """float32 is float64 here: families compute norms, rotary angles, recurrences and the loss in it whatever the model, and that rounds
    what is compared."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            return args[0].double()
        if func is Tensor.backward:
            with self:  # a mode is off in the functions that it calls, and replays are to have it
                seed = (torch.ones_like(args[0]),)
                return _engine_run_backward(args[:1], seed, False, False, (), allow_unreachable=True, accumulate_grad=True)
        wider = lambda value: torch.float64 if value is torch.float32 else value
        return func(*map(wider, args), **{name: wider(value) for name, value in (kwargs or {}).items()})


def check(family: str, plan: lt.Plan, parallel: lt.Parallel, call: dict, case: str, change=lambda model: None) -> None:
    with InDouble():
        model = hf_families.build(family)
        change(model)
        expected_loss, expected = gradients(model, **call)
        report = lt.apply(model, plan, parallel=parallel)
        report.check_replay()
        for _ in range(2):
            loss, grads = gradients(model, **call)
            assert abs(loss - expected_loss) <= EXACT * expected_loss, f"{case}: {loss} {expected_loss}"
            assert grads.keys() == expected.keys(), case
            for name, grad in grads.items():
                dist.all_reduce(grad)
                error = float((grad / dist.get_world_size() - expected[name]).norm() / expected[name].norm())
                assert error <= EXACT, f"{case}, {name}: {error:.1e}"
        report.undo()
        again, _ = gradients(model, **call)
        assert abs(again - expected_loss) <= EXACT * expected_loss, f"{case}: undo left something behind"


def quick(rank: int, world: int) -> None:
    cases = [("lfm2", "zigzag", "two rows"), ("qwen3_next", "contiguous", "packed"), ("bamba", "striped, no heads", "one row")]
    for family, way, call in cases:
        check(family, lt.Plan(chunk_tokens=16), WAYS[way], CALLS[call](), f"P={world}, {family}, {way}, {call}")


@pytest.mark.parametrize("world", [2, 3])
def test_states_go_from_process_to_process(world):
    run_ranks(quick, world)
