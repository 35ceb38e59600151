"""The C++ kernels: every instruction set, any number of threads, low precision, bounded memory."""

import subprocess
import sys

import pytest
import torch

from longtrain._extension import MISSING
from longtrain.ops.attention import attention, attention_backward, cpp
from longtrain.ops.attention.interface import checked_call
from tests.ops.attention_cases import assert_close, drawn_case, forward_backward

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.mark.parametrize("instruction_set", ["avx2", "avx512", "avx512bf16"])
def test_bf16_is_multiplied_and_added_as_float32(instruction_set):
    """Everything but the rounding of out and dq to bf16; AVX512-BF16 takes the scores from bf16 pairs."""
    if instruction_set not in cpp.instruction_sets(torch.bfloat16):
        pytest.skip(f"this processor or build has no {instruction_set}")
    for number in range(1, 240, 3):
        drawn, options = drawn_case(number, torch.bfloat16, longest=210)
        call = checked_call(drawn["q"], drawn["k"], drawn["v"], sink_logits=drawn["sink_logits"], **options)
        wide = {name: None if x is None else x.double() for name, x in drawn.items()}
        expected = forward_backward(wide | {"dlse": None}, options, "reference")
        expected.pop("dsink", None)  # made of lse and delta alone, outside the kernels
        out, lse = cpp.forward(call, drawn["q"], drawn["k"], drawn["v"], drawn["sink_logits"], instruction_set)
        dk, dv = (torch.zeros(drawn[name].shape) for name in "kv")
        delta = (wide["dout"] * expected["out"]).sum(-1).float()
        gradients = (drawn["dout"], drawn["q"], drawn["k"], drawn["v"], out, lse, delta, dk, dv)
        dq = cpp.backward(call, *gradients, instruction_set)
        assert_close(expected | {"lse": lse, "dk": dk, "dv": dv}, expected, 3e-6)
        assert_close(expected | {"out": out, "dq": dq}, expected, 2**-8)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("instruction_set", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_every_instruction_set_equals_the_reference(instruction_set, dtype, tolerance):
    if instruction_set not in cpp.instruction_sets(dtype):
        pytest.skip(f"this processor or build has no {instruction_set}")
    for number in range(0, 240, 3):
        drawn, options = drawn_case(number, dtype, longest=210)
        call = checked_call(drawn["q"], drawn["k"], drawn["v"], sink_logits=drawn["sink_logits"], **options)
        wide = {name: None if x is None else x.double() for name, x in drawn.items()}
        expected = forward_backward(wide | {"dlse": None}, options, "reference")
        expected.pop("dsink", None)  # made of lse and delta alone, outside the kernels
        out, lse = cpp.forward(call, drawn["q"], drawn["k"], drawn["v"], drawn["sink_logits"], instruction_set)
        dk, dv = (torch.zeros(drawn[name].shape, dtype=dtype) for name in "kv")
        delta = (drawn["dout"] * out).sum(-1)
        gradients = (drawn["dout"], drawn["q"], drawn["k"], drawn["v"], out, lse, delta, dk, dv)
        dq = cpp.backward(call, *gradients, instruction_set)
        assert_close({"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}, expected, tolerance)


@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (6, 2)])
def test_results_are_bitwise_the_same_for_any_number_of_threads(threads, heads, kv_heads):
    generator = torch.Generator().manual_seed(5)
    q, k, v, dout = (torch.randn(1, 1500, h, 32, generator=generator) for h in (heads, kv_heads, kv_heads, heads))
    results = []
    for count in (1, 2, 5, 1):
        threads(count)
        found = forward_backward(
            {"q": q, "k": k, "v": v, "dout": dout, "sink_logits": None, "dlse": None},
            {"causal": True, "window_size": (700, 0), "sink_tokens": 5, "deterministic": True}, "cpp",
        )
        results.append(found)
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


def relative(a, b):
    return float((a.detach().double() - b.double()).norm() / b.double().norm())


def low_precision_errors(T, dtype):
    q, k, v, dout = (torch.randn(1, T, 2, 64).to(dtype) for _ in range(4))
    exact = forward_backward(
        {n: x.double() for n, x in zip(("q", "k", "v", "dout"), (q, k, v, dout))} | {"sink_logits": None, "dlse": None},
        {"causal": True}, "cpp",
    )
    ours = forward_backward(
        {"q": q, "k": k, "v": v, "dout": dout, "sink_logits": None, "dlse": None}, {"causal": True}, "cpp"
    )
    inputs = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    theirs = torch.autograd.grad(out, inputs, dout.transpose(1, 2))
    theirs = dict(zip(("out", "dq", "dk", "dv"), (x.transpose(1, 2) for x in (out, *theirs))))
    return {n: (relative(ours[n].to(dtype), exact[n]), relative(theirs[n], exact[n])) for n in theirs}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_at_most_one_and_a_half_times_that_of_sdpa(dtype):
    for name, (ours, theirs) in low_precision_errors(1000, dtype).items():
        assert ours <= 1.5 * theirs, name


@pytest.mark.slow
def test_the_lse_of_a_long_row_is_right_to_its_last_place():
    """What a tile loses to rounding must not gather over the tiles of a row."""
    q, k, v = (torch.randn(1, n, 1, 64) for n in (64, 16384, 16384))
    lse = attention(q, k, v, causal=True, return_lse=True, backend="cpp")[1]
    exact = attention(q.double(), k.double(), v.double(), causal=True, return_lse=True, backend="cpp")[1]
    assert (lse - exact).abs().mean() <= 8 * 2**-23  # one unit in the last place of numbers from 8 to 16


def test_bf16_gradients_of_keys_do_not_lose_accuracy_with_length():
    short, long = low_precision_errors(4096, torch.bfloat16), low_precision_errors(16384, torch.bfloat16)
    for name in ("dk", "dv"):
        assert long[name][0] <= 3e-3 and long[name][0] <= 1.1 * short[name][0], (name, short[name], long[name])


MEMORY = """
import sys, torch
from longtrain.ops.attention import attention, attention_backward
from longtrain.train.peak_memory import read_peak
T, H, D = int(sys.argv[1]), 8, 64
q, k, v, dout = (torch.randn(1, T, H, D) for _ in range(4))
dk, dv = torch.zeros_like(k), torch.zeros_like(v)
small = [x[:, :256] for x in (q, k, v)]
attention(*small, causal=True)
before = read_peak(torch.device("cpu"))
options = {"causal": True, "window_size": (256, 0)}
out, lse = attention(q, k, v, return_lse=True, **options)
dq = attention_backward(dout, q, k, v, out, lse, dk=dk, dv=dv, **options)
results = sum(x.nbytes for x in (out, lse, dq)) / 2**20
print((read_peak(torch.device("cpu")) - before) / 2**20 - results)
"""


def test_workspace_is_bounded():
    """Forward and backward of 32K tokens need no more than inputs, outputs, gradients and 64 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY, "32768"], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64


@pytest.mark.parametrize("queries,keys", [(384, 384), (385, 600), (800, 800), (577, 100)])
@pytest.mark.parametrize(
    "options", [{}, {"window_size": (150, 0), "sink_tokens": 2}, {"causal": False, "window_size": (30, 200)}, {"q_offset": -250}]
)
def test_tasks_of_several_query_tiles_equal_the_reference(queries, keys, options):
    x = {
        name: torch.randn(1, n, h, 8, dtype=torch.float64)
        for name, n, h in (("q", queries, 2), ("k", keys, 1), ("v", keys, 1), ("dout", queries, 2))
    }
    x |= {"sink_logits": None, "dlse": None}
    options = {"causal": True, **options}
    assert_close(forward_backward(x, options, "cpp"), forward_backward(x, options, "reference"), 1e-12)


def test_strided_and_expanded_inputs_are_read_in_place():
    fused = torch.randn(1, 50, 3, 4, 16)
    q, k, v = fused.unbind(2)
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend="cpp")
    dense = attention(*(x.contiguous() for x in (q, k, v)), causal=True, backend="reference")
    torch.testing.assert_close(out, dense)
    both = torch.zeros(1, 50, 2, 4, 16)
    expanded = torch.ones(()).expand(1, 50, 4, 16)
    attention_backward(expanded, q, k, v, out, lse, dk=both[:, :, 0], dv=both[:, :, 1], causal=True, backend="cpp")
    dk, dv = torch.zeros(1, 50, 4, 16), torch.zeros(1, 50, 4, 16)
    attention_backward(expanded, q, k, v, out, lse, dk=dk, dv=dv, causal=True, backend="reference")
    torch.testing.assert_close(both[:, :, 0], dk, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[:, :, 1], dv, atol=1e-5, rtol=1e-5)
