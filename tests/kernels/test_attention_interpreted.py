"""The Triton kernels without a GPU: what they compute, in Triton's interpreter (`interpreted.py`), is the reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.ops.attention_cases import OPTIONS, drawn_case, drawn_options

pytest.importorskip("triton", reason="triton is not installed: pip install longtrain[gpu]")
ROOT = Path(__file__).parents[2]


def interpreted(*arguments) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpreted", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def quick_cases() -> list[int]:
    """Small cases of more than one tile that hold every option."""
    missing = set(OPTIONS)
    chosen = []
    for number in range(1000):
        drawn, _ = drawn_case(number, torch.float32, longest=130)
        T, S, heads = drawn["q"].shape[1], drawn["k"].shape[1], drawn["q"].shape[2] * drawn["q"].shape[0]
        if missing & drawn_options(number) and 33 <= T <= 96 and 65 <= S <= 130 and heads <= 4:
            chosen.append(number)
            missing -= drawn_options(number)
    assert not missing
    return chosen


def test_the_kernels_in_the_interpreter():
    interpreted("nan_reaches_only_rows_that_see_it", "autograd_and_the_functional_pair_agree", "no_query_or_no_key", *quick_cases())


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_drawn_cases_equal_the_reference(part):
    interpreted(*range(part, 300, 10))
