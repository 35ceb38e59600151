"""`tools/fuzz_parallel.py` on a few cases; and what it says of a case that goes wrong on one rank, and of one that kills a rank."""

import os
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import fuzz_parallel
from fuzz_parallel_cases import draw, run_case

from longtrain.parallel.by_heads import ByHeads


def test_a_few_cases(capfd):
    assert fuzz_parallel.main(["--processes", "2", "--seed", "2", "--count", "5", "--own"]) == 0
    assert "5 cases on 2 processes: 5 exact" in capfd.readouterr().out


def planted(case: dict, directory: str) -> str:
    """What goes wrong by seed, on rank 1 alone."""
    if dist.get_rank() and case["seed"] == 2:
        os._exit(3)
    return "weights: off by 1" if dist.get_rank() and case["seed"] == 1 else ""


def test_what_goes_wrong_is_told_with_its_command(capfd):
    assert fuzz_parallel.main(["--processes", "2", "--count", "3", "--own"], planted) == 1
    said = capfd.readouterr().out
    for kind, seed, why in (("wrong", 1, "off by 1"), ("broken", 2, "exit code 3")):
        assert f"{kind}: python tools/fuzz_parallel.py --processes 2 --seed {seed} --count 1 --own\n" in said and why in said
    assert "3 cases on 2 processes: 1 exact, 0 refused, 1 wrong, 1 broken" in said


def with_another_dk(case: dict, directory: str) -> str:
    """The case, with gradients of keys that are off by a billionth where heads are exchanged."""
    take = ByHeads.take_grad

    def take_grad(self, span):
        dk, dv = take(self, span)
        return dk * (1 + 1e-9), dv

    ByHeads.take_grad = take_grad  # in a process of its own
    return run_case(case, directory)


def test_a_billionth_is_seen(capfd):
    assert fuzz_parallel.main(["--processes", "2", "--seed", "140", "--count", "1", "--own"], with_another_dk) == 1
    assert "k_proj.weight: off by" in capfd.readouterr().out


@pytest.mark.parametrize("outcomes, kind", [
    ([("exact", ""), ("exact", "")], "exact"),
    ([("exact", ""), ("wrong", "a gradient")], "wrong"),
    ([("refused", "process 0 has 3 tokens"), ("refused", "process 1 has 3 tokens")], "refused"),
    ([("refused", "3 tokens"), ("refused", "4 tokens")], "broken"),
    ([("refused", "3 tokens"), ("exact", "")], "broken"),
])
def test_what_all_ranks_have_to_say(outcomes, kind):
    assert fuzz_parallel.judged(outcomes)[0] == kind


def test_a_seed_is_a_case():
    assert draw(5, 3, own=False) == draw(5, 3, own=False) != draw(6, 3, own=False)
