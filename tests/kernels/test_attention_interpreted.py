"""The Triton kernels without a GPU: what they compute, in Triton's interpreter (`interpreted.py`), is the reference."""

import pytest
import torch

from tests.kernels.interpreter import interpreted
from tests.ops.attention_cases import OPTIONS, drawn_case, drawn_options

pytest.importorskip("triton", reason="triton is not installed: pip install longtrain[gpu]")


def quick_cases() -> list[int]:
    """Small cases of more than one tile that hold every option."""
    missing = set(OPTIONS)
    chosen = []
    for number in range(1000):
        drawn, _ = drawn_case(number, torch.float32, longest=130)
        T, S, heads = drawn["q"].shape[1], drawn["k"].shape[1], drawn["q"].shape[2] * drawn["q"].shape[0]
        if missing & drawn_options(number) and 33 <= T <= 66 and 65 <= S <= 130 and heads <= 4:
            chosen.append(number)
            missing -= drawn_options(number)
    assert not missing
    return chosen


def test_the_kernels_in_the_interpreter():
    interpreted(
        "interpreted",
        "no_query_or_no_key", "every_alignment_of_mask_and_tiles", "sinks_and_kept_blocks_outside_the_window",
        "nan_reaches_only_rows_that_see_it", "autograd_and_the_functional_pair_agree", *quick_cases(),
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_drawn_cases_equal_the_reference(part):
    interpreted("interpreted", *range(part, 300, 10))
