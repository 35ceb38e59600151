"""The attention op: every backend against the oracle, the oracle against the definition, and what options mean."""

import math

import pytest
import torch

from longtrain._extension import MISSING
from longtrain.ops.attention import attention, attention_backward, explain, merge_attention, tiled
from tests.ops.attention_cases import IMPOSSIBLE, OPTIONS, PAIRS, assert_close, drawn_case, drawn_options, forward_backward

needs_extension = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
BACKENDS = [pytest.param("cpp", marks=needs_extension), "tiled"]
FAST = ("cpp", "sdpa", "tiled")
CASES = 500
pytestmark = pytest.mark.usefixtures("one_thread")  # threads: see the kernels' tests


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN, so that a result that was never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def tensors(T=9, S=12, B=1, H=4, K=2, D=8, V=6, dtype=torch.float64):
    q, k, v, dout = (torch.randn(B, n, h, d, dtype=dtype) for n, h, d in ((T, H, D), (S, K, D), (S, K, V), (T, H, V)))
    return {"q": q, "k": k, "v": v, "dout": dout, "sink_logits": None, "dlse": None}


def test_the_drawn_cases_hold_every_pair_of_options():
    seen = {frozenset((a, b)) for n in range(CASES) for a in drawn_options(n) for b in drawn_options(n) if a != b}
    assert len(PAIRS) + len(IMPOSSIBLE) == len(OPTIONS) * (len(OPTIONS) - 1) // 2
    assert {frozenset(p) for p in PAIRS} <= seen


def check_against_reference(numbers, among=FAST, **limits):
    for number in numbers:
        dtype, tolerance = (torch.float64, 1e-12) if number % 3 else (torch.float32, 3e-6)
        drawn, options = drawn_case(number, dtype, **limits)
        wide = {name: None if x is None else x.double() for name, x in drawn.items()}
        expected = forward_backward(wide, options, "reference")
        backends = [name for name in among if name not in explain_drawn(drawn, options).refusals]
        for backend in backends:
            try:
                assert_close(forward_backward(drawn, options, backend), expected, tolerance)
            except AssertionError as error:
                raise AssertionError(f"case {number}, {backend}: {options}") from error
        yield number, backends


def explain_drawn(drawn, options):
    found = explain(drawn["q"], drawn["k"], drawn["v"], sink_logits=drawn["sink_logits"], **options)
    if drawn["dlse"] is not None:  # only the backward knows of this gradient
        found.refusals.setdefault("sdpa", "a gradient of the LSE")
    return found


@pytest.mark.parametrize("part", range(10))
def test_drawn_cases_equal_the_reference(poisoned, part):
    for _, backends in check_against_reference(range(part, CASES, 10), longest=210):
        assert "tiled" in backends and ("cpp" in backends) == (MISSING is None)


def test_many_tiles_of_plain_torch_equal_the_reference(poisoned, monkeypatch):
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", 1)  # tiles of 16 tokens, the least; as a rule they have a thousand, more than a case
    assert len(list(check_against_reference(range(100), among=("tiled",), longest=210))) == 100


def test_drawn_cases_that_sdpa_does_not_refuse(poisoned):
    simple = [n for n in range(600) if not drawn_options(n) & {"softcap", "dropout", "sink_tokens", "block_stride"}]
    served = [n for n, backends in check_against_reference(simple[:120], longest=210) if "sdpa" in backends]
    assert len(served) > 20


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_many_more_drawn_cases_equal_the_reference(poisoned, part):
    assert len(list(check_against_reference(range(CASES + part, CASES + 2000, 20), longest=700))) == 100


def scores_by_definition(q, k, b, h, options):
    """{(i, j): score} over the visible pairs, one at a time, straight from the documented rule."""
    T, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k_offset = options.get("k_offset", 0)
    q_offset = options.get("q_offset", k_offset + S - T)
    left, right = options.get("window_size", (-1, -1))
    block, stride = options.get("block_stride", (1, 0))
    found = {}
    for i in range(T):
        for j in range(S):
            p, s = i + q_offset, j + k_offset
            near = (left < 0 or s >= p - left) and (right < 0 or s <= p + right)
            special = 0 <= s < options.get("sink_tokens", 0) or (stride and (s // block) % stride == 0)
            if (near or special) and not (options["causal"] and s > p):
                score = float(q[b, i, h] @ k[b, j, h // group]) * q.shape[3] ** -0.5
                cap = options.get("softcap")
                found[i, j] = score if cap is None else cap * math.tanh(score / cap)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": False, "window_size": (2, 1)},
        {"causal": True, "window_size": (3, 0), "sink_tokens": 2, "k_offset": 1},
        {"causal": True, "window_size": (1, 0), "block_stride": (2, 3), "k_offset": -3},
        {"causal": True, "q_offset": -4, "softcap": 0.7},
        {"causal": True, "q_offset": 30, "window_size": (25, -1)},
    ],
)
def test_the_reference_is_the_definition(options):
    x = tensors()
    sinks = torch.randn(4, dtype=torch.float64)
    out, lse = attention(x["q"], x["k"], x["v"], sink_logits=sinks, return_lse=True, backend="reference", **options)
    for h in range(4):
        scores = scores_by_definition(x["q"], x["k"], 0, h, options)
        for i in range(9):
            row = {j: math.exp(s) for (i_, j), s in scores.items() if i_ == i}
            total = sum(row.values()) + math.exp(sinks[h])
            expected = sum((e / total * x["v"][0, j, h // 2] for j, e in row.items()), torch.zeros(6, dtype=torch.float64))
            torch.testing.assert_close(out[0, i, h], expected, rtol=1e-12, atol=1e-12)
            assert abs(float(lse[0, i, h]) - math.log(total)) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "tiled", "sdpa", pytest.param("cpp", marks=needs_extension)])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_agree_with_finite_differences(backend, packed):
    x = tensors(T=3, S=4, H=2, K=1, D=4, V=4)
    options = {"cu_seqlens_q": torch.tensor([0, 1, 3]), "cu_seqlens_k": torch.tensor([0, 2, 4])} if packed else {}
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    inputs = [x[name].requires_grad_() for name in "qkv"] + [sinks]

    def run(q, k, v, sinks):
        return attention(q, k, v, causal=True, sink_logits=sinks, backend=backend, **options)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_lse(backend):
    x = tensors(T=3, S=4, H=2, K=1, D=4, V=3)
    inputs = [x[name].requires_grad_() for name in "qkv"]
    options = {"causal": True, "window_size": (3, 0), "softcap": 2.0, "dropout_p": 0.3, "dropout_seed": 4}
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, return_lse=True, backend=backend, **options), inputs)


CHUNKED = [
    {},
    {"window_size": (50, 0), "sink_tokens": 3},
    {"window_size": (9, 0), "block_stride": (8, 3)},
    {"cu_seqlens_q": torch.tensor([0, 100, 130, 260])},
    {"dropout_p": 0.4, "dropout_seed": 11, "softcap": 3.0},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", CHUNKED)
def test_chunks_of_queries_against_their_prefix_are_the_whole(backend, options):
    T, chunk = 260, 64
    x = tensors(T=T, S=T)
    whole = forward_backward(x, {"causal": True, **options}, backend)
    bounds = options.get("cu_seqlens_q")
    out, lse, dq = [], [], []
    dk, dv = torch.zeros_like(x["k"]), torch.zeros_like(x["v"])
    for a in range(0, T, chunk):
        b = min(a + chunk, T)
        here = {"causal": True, **options, "q_offset": a}
        if bounds is not None:
            here |= {"cu_seqlens_q": bounds.clamp(a, b) - a, "cu_seqlens_k": bounds.clamp(max=b)}
        q, k, v = x["q"][:, a:b], x["k"][:, :b], x["v"][:, :b]
        out_c, lse_c = attention(q, k, v, return_lse=True, backend=backend, **here)
        out.append(out_c)
        lse.append(lse_c)
        dq.append(
            attention_backward(
                x["dout"][:, a:b], q, k, v, out_c, lse_c, dk=dk[:, :b], dv=dv[:, :b], backend=backend, **here
            )
        )
    chunked = {"out": torch.cat(out, 1), "lse": torch.cat(lse, 1), "dq": torch.cat(dq, 1), "dk": dk, "dv": dv}
    assert_close(chunked, whole, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", CHUNKED)
def test_blocks_of_keys_merge_to_the_whole(backend, options):
    T, edges = 260, [0, 70, 71, 200, 260]
    x = tensors(T=T, S=T)
    whole = forward_backward(x, {"causal": True, **options}, backend)
    bounds = options.get("cu_seqlens_q")
    blocks = []
    for a, b in zip(edges, edges[1:]):
        here = {"causal": True, **options, "q_offset": 0, "k_offset": a}
        if bounds is not None:
            # The first boundary is where the first document began: before this block, so negative.
            clipped = bounds.clamp(max=b) - a
            here["cu_seqlens_k"] = torch.cat([clipped[:1], clipped[1:].clamp(min=0)])
        blocks.append((slice(a, b), here))
    out = torch.zeros_like(whole["out"])
    lse = torch.full_like(whole["lse"], -torch.inf)
    for cols, here in blocks:
        part = attention(x["q"], x["k"][:, cols], x["v"][:, cols], return_lse=True, backend=backend, **here)
        out, lse = merge_attention(out, lse, *part)
    dk, dv = torch.zeros_like(x["k"]), torch.zeros_like(x["v"])
    dq = sum(
        attention_backward(
            x["dout"], x["q"], x["k"][:, cols], x["v"][:, cols], out, lse, dk=dk[:, cols], dv=dv[:, cols],
            backend=backend, **here,
        )
        for cols, here in blocks
    )
    assert_close({"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}, whole, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_are_separate_calls(backend):
    x = tensors(T=230, S=260)
    cu_q, cu_k = [0, 100, 100, 101, 230], [0, 110, 115, 115, 260]
    options = {"causal": True, "window_size": (20, 0), "sink_tokens": 2, "block_stride": (4, 5)}
    out = attention(
        x["q"], x["k"], x["v"], cu_seqlens_q=torch.tensor(cu_q), cu_seqlens_k=torch.tensor(cu_k), backend=backend, **options
    )
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        alone = attention(x["q"][:, a:b], x["k"][:, c:d], x["v"][:, c:d], backend=backend, **options)
        torch.testing.assert_close(out[:, a:b], alone, rtol=1e-12, atol=1e-12)


def test_merge_is_overflow_free_and_safe_for_empty_rows():
    out_a, out_b = torch.ones(1, 3, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 3, 1, 2, dtype=torch.bfloat16)
    lse_a, lse_b = torch.tensor([3e38, -torch.inf, 500.0]), torch.tensor([0.0, -torch.inf, 500.0])
    out, lse = merge_attention(out_a, lse_a.view(1, 3, 1), out_b, lse_b.view(1, 3, 1))
    assert out.dtype == torch.float32
    assert out[0, :, 0, 0].tolist() == [1.0, 0.0, 0.5]
    assert lse.flatten().tolist() == pytest.approx([3e38, -math.inf, 500 + math.log(2)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T,S", [(0, 5), (5, 0), (0, 0)])
def test_empty_queries_or_keys(backend, T, S):
    x = tensors(T=T, S=S)
    inputs = [x[name].requires_grad_() for name in "qkv"]
    out, lse = attention(*inputs, causal=True, return_lse=True, backend=backend)
    assert out.shape == (1, T, 4, 6) and (out == 0).all() and lse.isneginf().all()
    for tensor, gradient in zip(inputs, torch.autograd.grad(out.sum(), inputs)):
        assert gradient.shape == tensor.shape and (gradient == 0).all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_bad_value_reaches_only_the_rows_that_see_it(backend, poison, name):
    T, at, window = 230, 100, 60
    x = tensors(T=T, S=T)
    x[name][0, at, 1] = poison
    results = forward_backward(x, {"causal": True, "window_size": (window, 0)}, backend)
    rows = torch.arange(T)
    hit = rows == at if name == "q" else (rows >= at) & (rows <= at + window)
    heads = [1] if name == "q" else [2, 3]
    bad = ~results["out"][0].isfinite().all(-1)
    assert not bad[~hit].any() and not bad[:, [h for h in range(4) if h not in heads]].any()
    if name != "k" or poison != float("inf"):  # a key of +-inf scores +-inf: those that score -inf do not see it
        assert bad[hit][:, heads].all()
    assert not results["dq"][0].isfinite().logical_not().any(-1)[~hit].any()
    cols_near = (rows >= at - window) & (rows <= at + window)
    assert not results["dk"][0].isnan().any(-1)[~cols_near].any()
    assert not results["dv"][0].isnan().any(-1)[~cols_near].any()


def test_attention_compiles_and_is_opaque_to_the_compiler():
    x = tensors(dtype=torch.float32, V=8)
    inputs = [x[name].requires_grad_() for name in "qkv"]

    def loss(q, k, v):
        return attention(q * 2, k, v, causal=True, window_size=(4, 0), sink_tokens=1).square().sum()

    eager = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(a, b)


def test_the_custom_ops_keep_their_promises():
    x = tensors(dtype=torch.float32)
    arguments = (x["q"], x["k"], x["v"], None, None, None, True, -1, -1, None, 0, 0, 64, 0, None, None, None, None)
    torch.library.opcheck(torch.ops.longtrain.attention.default, (*arguments, 0.0, None, 0, False, "auto"))
