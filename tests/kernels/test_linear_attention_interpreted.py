"""Linear attention by Triton kernels without a GPU: what they compute, in Triton's interpreter (`linear_attention_interpreted.py`), is the
recurrence."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install longtrain[gpu]")
from longtrain.ops.linear_attention import linear_attention
from tests.kernels.interpreter import interpreted


def test_the_kernels_in_the_interpreter():
    interpreted("linear_attention_interpreted", "one_token_and_none", "documents", "what_is_refused")


@pytest.mark.slow
def test_more_of_the_kernels_in_the_interpreter():
    interpreted(
        "linear_attention_interpreted",
        "every_decay_with_and_without_the_delta_rule",
        "strong_decays_lose_nothing_that_is_near",
        "pieces_change_nothing",
        "strides_do_not_matter",
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_many_drawn_calls_equal_the_recurrence(part):
    interpreted("linear_attention_interpreted", *range(part, 30, 3))


def test_on_a_cpu_it_is_refused_with_the_reason():
    q = torch.ones(1, 4, 1, 16)
    with pytest.raises(ValueError, match="'triton' refuses this call .GPU kernels: the tensors are on cpu"):
        linear_attention(q, q, q, backend="triton")
