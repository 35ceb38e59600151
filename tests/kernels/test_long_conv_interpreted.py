"""Long convolutions by Triton kernels without a GPU: what they compute, in Triton's interpreter (`long_conv_interpreted.py`), is
convolution."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install longtrain[gpu]")
from longtrain.ops.long_conv import explain, long_conv
from tests.kernels.interpreter import interpreted


def test_the_kernels_in_the_interpreter():
    interpreted("long_conv_interpreted", "odd_lengths_and_filters_shorter_and_longer", "through_the_public_functions", "what_is_refused")


@pytest.mark.slow
def test_more_of_the_kernels_in_the_interpreter():
    interpreted(
        "long_conv_interpreted",
        "one_token",
        "gates_skip_heads_and_documents",
        "nan_stays_in_its_row",
        "groups_cut_inside_a_head",
        "only_what_is_wanted",
    )


@pytest.mark.slow
def test_pieces_and_large_transforms_in_the_interpreter():
    interpreted("long_conv_interpreted", "pieces_of_a_document", "several_tiles", "order_three")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_many_drawn_cases_are_convolutions(part):
    interpreted("long_conv_interpreted", *range(part, 15, 3))


def test_on_a_cpu_it_is_refused_with_the_reason():
    u, k = torch.ones(1, 8, 2), torch.ones(2, 8)
    assert explain(u, k)["triton"] == "GPU kernels: the tensors are on cpu"
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        long_conv(u, k, backend="triton")
