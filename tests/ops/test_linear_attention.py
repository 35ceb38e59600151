"""`linear_attention` by chunks, in torch and in C++, against its recurrence, and the recurrence against what a person can check."""

import math

import pytest
import torch

from longtrain.ops.linear_attention import chunked, cpp, decay, explain, linear_attention, linear_attention_backward
from longtrain.ops.linear_attention.call import checked
from tests.held import most_held
from tests.ops.linear_attention_cases import F64, KINDS, assert_same, drawn, make, output_and_grads, relative, upstream

MISSING = cpp.refuse(checked(*[torch.ones(1, 1, 1, 1)] * 3, None, None, None, None, None, 64))
SERVING = ["chunked"] if MISSING else ["chunked", "cpp"]
SETS = [] if MISSING else cpp.instruction_sets()
by_matrices = pytest.mark.parametrize(
    "backend", ["chunked", pytest.param("cpp", marks=pytest.mark.skipif(MISSING is not None, reason=str(MISSING)))]
)


@pytest.mark.parametrize("block", range(12))
def test_chunks_equal_the_recurrence(block):
    """300 drawn calls: lengths, chunks, documents (empty ones, too), decays of every kind and strength, states, the delta rule."""
    for case in range(25 * block, 25 * block + 25):
        data, options = drawn(case)
        expected = output_and_grads(data, **options, backend="reference")
        for backend in SERVING:
            try:
                assert_same(output_and_grads(data, **options, backend=backend), expected)
            except AssertionError as error:
                raise AssertionError(
                    f"{backend}, case {case}, { ({n: list(t.shape) for n, t in data.items()}) }, {options}: {error}"
                ) from None


@by_matrices
@pytest.mark.parametrize("block", range(4))
def test_float32_is_as_exact_as_the_recurrence_in_float32(block, backend):
    """Against float64 on the same rounded inputs: at most twice the recurrence's own error, both measured over 10 calls together. With
    the delta rule on keys in many directions: the system of a chunk whose keys are all parallel costs a digit."""
    ours, theirs = {}, {}
    for case in range(10 * block, 10 * block + 10):
        data, options = drawn(1000 + case)
        if "beta" in data:
            data = make(T=data["q"].shape[1], D=16, forget=("head", "feature")[case % 2], beta=True, state=True, seed=case, strength=0.3)
        narrow = {name: t.float() for name, t in data.items()}
        exact = output_and_grads({name: t.double() for name, t in narrow.items()}, **options, backend="reference")
        for errors, named in ((ours, backend), (theirs, "reference")):
            result = output_and_grads(narrow, **options, backend=named)
            scale = max(float(t.detach().norm()) for t in exact.values())
            for name in exact:
                error = float((result[name].double() - exact[name]).detach().norm() / exact[name].detach().norm().clamp_min(1e-3 * scale))
                errors[name] = errors.get(name, 0) + error**2
    for name in ours:
        assert ours[name] <= 4 * theirs[name] + (2e-7) ** 2, f"{name}: {ours[name] ** 0.5:.1e} against {theirs[name] ** 0.5:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("forget, beta", [(None, False), ("feature", False), ("head", True)])
@by_matrices
def test_narrow_types_compute_in_float32(backend, dtype, forget, beta):
    data = make(T=300, D=16, V=16, forget=forget, beta=beta, dtype=dtype, strength=0.05)
    ours = output_and_grads(data, backend=backend)
    exact = output_and_grads({name: t.double() for name, t in data.items()}, backend="reference")
    assert ours["state"].dtype == torch.float32
    for name in data | {"out": 0}:
        assert ours[name].dtype == dtype
        assert relative(ours[name], exact[name]) < torch.finfo(dtype).eps / 2, name  # rounded once


@by_matrices
def test_decays_and_betas_may_be_wider_than_queries(backend):
    data = make(forget="head", beta=True, dtype=torch.bfloat16)
    data["decay"], data["beta"] = data["decay"].float(), data["beta"].float()
    ours = output_and_grads(data, backend=backend)
    assert (ours["out"].dtype, ours["q"].dtype, ours["decay"].dtype, ours["beta"].dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(output_and_grads(data, backend=backend), ours, 0)


@by_matrices
@pytest.mark.parametrize("kind", ["head", "feature"])
def test_strong_decays_lose_nothing_that_is_near(kind, backend):
    """A token that forgets nearly all, then tokens that forget nearly nothing: sums of the whole chunk would drown the small ones."""
    data = make(T=64, D=4, V=4, forget=kind, dtype=torch.float32)
    data["decay"] = torch.full_like(data["decay"], -1e-4)
    data["decay"][:, 10] = -1e5
    ours = output_and_grads(data, backend=backend)
    exact = output_and_grads({name: t.double() for name, t in data.items()}, backend="reference")
    for name in ours:
        assert relative(ours[name], exact[name]) < 1e-6, name


@by_matrices
@pytest.mark.parametrize("kind", ["fixed", "head", "feature"])
@pytest.mark.parametrize("beta", [False, True])
def test_a_decay_of_minus_infinity_is_a_document_s_beginning(kind, beta, backend):
    data = make(T=40, forget=kind, beta=beta)
    if kind == "fixed":
        data["decay"] = data["decay"].expand(2, 40, 2).contiguous()
    packed = output_and_grads(data, cu_seqlens=torch.tensor([0, 13, 40]), chunk_size=16, backend=backend)
    data["decay"] = data["decay"].clone()
    data["decay"][:, 13] = -math.inf
    marked = output_and_grads(data, chunk_size=16, backend=backend)
    assert all(t.isfinite().all() for t in marked.values())
    assert_same(marked, packed, 0 if kind != "fixed" else 1e-14)


@pytest.mark.parametrize("forget, beta", [(None, False), ("feature", True)])
@pytest.mark.parametrize("edges", [[0, 7, 37], [0, 1, 2, 37], [0, 0, 5, 5, 37, 37]])
def test_documents_equal_separate_calls(edges, forget, beta):
    data = make(B=1, forget=forget, beta=beta)
    packed = linear_attention(**data, cu_seqlens=torch.tensor(edges), chunk_size=8)
    for start, stop in zip(edges, edges[1:]):
        alone = linear_attention(**{name: t[:, start:stop] for name, t in data.items()}, chunk_size=8)
        torch.testing.assert_close(packed[:, start:stop], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("forget, beta", [(None, False), ("head", True), ("feature", True), ("fixed", False)])
@pytest.mark.parametrize("cut", [1, 16, 20, 36])
def test_a_sequence_in_two_calls_is_the_sequence(forget, beta, cut):
    data = make(forget=forget, beta=beta, state=True)
    whole, state = linear_attention(**data, return_state=True, chunk_size=16)
    first = {name: t if name == "initial_state" or t.dim() == 1 else t[:, :cut] for name, t in data.items()}
    second = {name: t if t.dim() == 1 else t[:, cut:] for name, t in data.items()}
    a, middle = linear_attention(**first, return_state=True, chunk_size=16)
    b, last = linear_attention(**{**second, "initial_state": middle}, return_state=True, chunk_size=16)
    torch.testing.assert_close(torch.cat([a, b], 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=1e-12, atol=1e-12)


@by_matrices
@pytest.mark.parametrize("forget, beta", [(None, False), ("feature", True)])
def test_pieces_change_nothing(forget, beta, backend, monkeypatch):
    data = make(T=200, forget=forget, beta=beta, state=True)
    whole = output_and_grads(data, chunk_size=8, backend=backend)
    monkeypatch.setattr(chunked, "PIECE_TOKENS", {"cpu": 64, "other": 64})
    assert_same(output_and_grads(data, chunk_size=8, backend=backend), whole, 1e-14)


@by_matrices
def test_the_backward_pass_alone(backend, monkeypatch):
    data = make(T=70, forget="head", beta=True, state=True)
    expected = output_and_grads(data, backend="reference")
    out, state = linear_attention(**data, return_state=True)
    dout, dstate = upstream(out, state)
    monkeypatch.setattr(chunked, "PIECE_TOKENS", {"cpu": 64, "other": 64})
    grads = linear_attention_backward(dout, **data, dstate=dstate, backend=backend)
    assert_same(dict(zip(data, grads)), {name: expected[name] for name in data})
    without = linear_attention_backward(dout, **{n: t for n, t in data.items() if n in "qkv"}, backend=backend)
    assert [g is None for g in without] == [False, False, False, True, True, False]


def test_reference_by_hand():
    """Two features, one value, two tokens: a decay a feature, a half-overwriting beta."""
    q, k = torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    v, log_decay, beta = torch.tensor([4.0, 5.0]), torch.tensor([[0.0, 0.0], [math.log(0.5), math.log(0.25)]]), torch.tensor([1.0, 0.5])
    # S_1 = beta v k = (4, 0); out_1 = 4. Decayed (2, 0), read by k_2: 1.2; u_2 = 0.5 (5 - 1.2) = 1.9; S_2 = (2 + 1.14, 1.52)
    out, state = linear_attention(
        *(t.view(1, 2, 1, -1) for t in (q, k, v)), decay=log_decay.view(1, 2, 1, 2), beta=beta.view(1, 2, 1), scale=1.0, return_state=True,
        backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(state.flatten(), torch.tensor([3.14, 1.52]))
    torch.testing.assert_close(out.flatten(), torch.tensor([4.0, 3 * 3.14 + 1.52]))


def test_without_decay_it_is_attention_without_softmax():
    data = make(T=20)
    scores = torch.einsum("bthd,bshd->bhts", data["q"], data["k"]).tril() / math.sqrt(5)
    torch.testing.assert_close(linear_attention(**data, chunk_size=4), torch.einsum("bhts,bshv->bthv", scores, data["v"]))


def test_the_delta_rule_returns_what_was_written_last():
    """beta = 1 and keys of norm 1: reading with the key that was just written gives its value, whatever stood there."""
    data = make(T=50, D=4, V=3)
    out = linear_attention(data["k"], data["k"], data["v"], beta=torch.ones(2, 50, 2, dtype=F64), scale=1.0, chunk_size=16)
    torch.testing.assert_close(out, data["v"], rtol=1e-12, atol=1e-12)


def test_decayed_scores_by_their_definition():
    for features in (1, 4):
        q, k, g = torch.randn(2, 8, 4, dtype=F64), torch.randn(8, 4, dtype=F64), -torch.rand(8, features, dtype=F64)
        expected = torch.zeros(2, 8, 8, dtype=F64)
        for i in range(8):
            for j in range(i + 1):
                expected[:, i, j] = (q[:, i] * k[j] * g[j + 1 : i + 1].sum(0).exp()).sum(-1)
        torch.testing.assert_close(decay.scores(q, k, g), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("forget, beta", [(None, False), ("feature", True)])
def test_the_op_is_registered_as_torch_wants_it(forget, beta):
    data = {name: t.requires_grad_() for name, t in make(T=12, forget=forget, beta=beta, state=beta).items()}
    optional = (data.get("decay"), data.get("beta"), data.get("initial_state"), torch.tensor([0, 5, 12]))
    full = (data["q"], data["k"], data["v"], *optional, 0.5, 4, "auto")
    torch.library.opcheck(torch.ops.longtrain.linear_attention.default, full)


@pytest.mark.parametrize("edges", [None, torch.tensor([0, 7, 30])])
def test_compiled_it_is_one_graph_with_the_same_bits(edges):
    data = make(T=30, forget="head", beta=True, dtype=torch.float32)

    def step(q, k, v, decay, beta):
        return linear_attention(q * 2, k, v, decay=decay, beta=beta, chunk_size=16, cu_seqlens=edges).sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for f in (step, compiled):
        leaves = [t.clone().requires_grad_() for t in data.values()]
        y = f(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_saves_its_inputs_and_the_states_of_pieces_only():
    data = {name: t.requires_grad_() for name, t in make(T=50, forget="head", beta=True, state=True).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        linear_attention(**data)
    others = [t for t in saved if t.data_ptr() not in {p.data_ptr() for p in data.values()}]
    assert [list(t.shape) for t in others] == [[2, 1, 2, 5, 3]]


@pytest.mark.parametrize("frozen", ["q", "k", "v", "decay", "beta", "initial_state"])
def test_frozen_tensors(frozen):
    data = make(forget="head", beta=True, state=True)
    expected = output_and_grads(data)
    leaves = {name: t.clone().requires_grad_(name != frozen) for name, t in data.items()}
    out, state = linear_attention(**leaves, return_state=True)
    torch.autograd.backward((out, state), upstream(out, state))
    assert leaves[frozen].grad is None
    assert_same({n: t.grad for n, t in leaves.items() if n != frozen}, {n: expected[n] for n in leaves if n != frozen}, 1e-14)


@by_matrices
def test_strides_do_not_matter(backend):
    data = make(T=20, forget="feature", beta=True)
    strided = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in data.items()}
    assert_same(output_and_grads(strided, backend=backend), output_and_grads(data, backend=backend), 0)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("D, V", [(20, 70), (100, 5), (64, 128)])
def test_every_instruction_set_and_wide_heads(instruction_set, D, V):
    for forget, beta in ((None, False), ("head", True), ("feature", True)):
        data = make(B=1, T=150, H=1, D=D, V=V, forget=forget, beta=beta, state=True, strength=0.1)
        expected = output_and_grads(data, backend="chunked")
        call = checked(*(data.get(name) for name in ("q", "k", "v", "decay", "beta")), None, data["initial_state"], None, 64)
        out, state, entries = cpp.forward(call, instruction_set)
        grads = cpp.backward(call, entries, *upstream(out, state), instruction_set)
        given = ("q", "k", "v", "decay", "beta", "initial_state")
        found = {name: grad.view_as(data[name]) for name, grad in zip(given, grads, strict=True) if grad is not None and name in data}
        assert_same({"out": out, "state": state} | found, {name: expected[name] for name in ("out", "state", *found)})


@pytest.fixture
def threads():
    """Sets torch's threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("forget", KINDS)
@pytest.mark.parametrize("beta", [False, True])
def test_threads_do_not_change_a_bit(forget, beta, instruction_set, threads, monkeypatch):
    """A head of its own for every thread, heads that threads share, and both: three pieces, columns that do not divide among them."""
    monkeypatch.setattr(chunked, "PIECE_TOKENS", {"cpu": 130, "other": 130})
    for heads, D, V, dtype in ((1, 20, 70, torch.float32), (3, 5, 3, torch.bfloat16), (2, 17, 40, F64)):
        data = make(B=1, T=300, H=heads, D=D, V=V, forget=forget, beta=beta, state=True, dtype=dtype, strength=0.1)
        call = checked(*(data.get(name) for name in ("q", "k", "v", "decay", "beta")), None, data["initial_state"], None, 64)
        results = []
        for number in (1, 2, 3, 5):
            threads(number)
            out, state, entries = cpp.forward(call, instruction_set)
            results.append([out, state, entries, *cpp.backward(call, entries, *upstream(out, state), instruction_set)])
        for number, found in zip((2, 3, 5), results[1:], strict=True):
            for index, (x, one) in enumerate(zip(found, results[0], strict=True)):
                assert x is one is None or torch.equal(x, one), (heads, number, index)


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("block", range(4))
def test_heads_that_threads_share_equal_the_recurrence(block, threads, monkeypatch):
    monkeypatch.setattr(chunked, "PIECE_TOKENS", {"cpu": 128, "other": 128})
    for case in range(10 * block, 10 * block + 10):
        data, options = drawn(case, tokens=256 + 7 * case % 100)
        expected = output_and_grads(data, **options, backend="reference")
        threads(4 + case % 3)
        assert_same(output_and_grads(data, **options, backend="cpp"), expected)
        threads(1)


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("number, heads, tokens", [(1, 3, 300), (3, 1, 300), (2, 3, 3000), (2, 4, 300), (3, 2, 100)])
def test_the_workspace_is_as_predicted(number, heads, tokens, threads):
    threads(number)
    data = make(B=1, T=tokens, H=heads, D=64, V=64, dtype=torch.float32)
    call = checked(data["q"], data["k"], data["v"], None, None, None, None, None, 64)
    out, state, entries = cpp.forward(call)
    results = []
    held = most_held(lambda: results.append(cpp.backward(call, entries, out, state)))
    held -= sum(x.nbytes for x in results[0] if x is not None)
    assert abs(held - cpp.footprint_bytes(tokens, heads, 64, 64, itemsize=4)) < 4096


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_what_the_kernels_refuse():
    for change, why in (
        (dict(D=129), "129 key features are above 128"),
        (dict(V=130), "130 value features"),
        (dict(T=0), "nothing to compute"),
    ):
        assert why in explain(**make(**change))["cpp"]


def test_no_token_at_all():
    data = make(T=0, state=True, forget="head", beta=True)
    result = output_and_grads(data)
    assert result["out"].shape == (2, 0, 2, 3) and torch.equal(result["state"], data["initial_state"])


def test_second_derivatives_are_refused_and_the_reference_has_them():
    data = {name: t.requires_grad_() for name, t in make(T=5).items()}
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(linear_attention(**data).sum(), data["q"], create_graph=True)
    torch.autograd.grad(linear_attention(**data, backend="reference").sum(), data["q"], create_graph=True)


@pytest.mark.parametrize("change, match", [
    (dict(k=torch.ones(2, 37, 1, 5)), "repeat keys and values"),
    (dict(v=torch.ones(2, 36, 2, 3)), "do not fit"),
    (dict(q=torch.ones(2, 37, 10)), "do not fit"),
    (dict(q=torch.ones(2, 37, 2, 5, dtype=torch.int64)), "q must be a real floating-point tensor"),
    (dict(beta=torch.ones(2, 37)), r"beta must have shape \[B, T, H\] = \[2, 37, 2\]"),
    (dict(initial_state=torch.ones(2, 2, 3, 5)), r"initial_state must have shape \[B, H, D, Dv\]"),
    (dict(decay=torch.zeros(37, 2)), r"decay must be a number, or floating point of shape \[H\]"),
    (dict(decay=0.5), "at most 0, found 0.5"),
    (dict(decay=float("nan")), "at most 0, found nan"),
    (dict(chunk_size=48), "power of two, not 48"),
    (dict(chunk_size=0), "power of two"),
    (dict(cu_seqlens=torch.tensor([0, 36])), "must ascend from 0 to T = 37"),
    (dict(cu_seqlens=torch.tensor([0, 8, 7, 37])), "must ascend"),
    (dict(cu_seqlens=torch.tensor([0.0, 37.0])), "int32 or int64"),
    (dict(cu_seqlens=[0, 37]), r"int32 or int64 tensor, not \[0, 37\]"),
    (dict(q=None), "q must be a real floating-point tensor, not NoneType"),
    (dict(k=torch.ones(2, 37, 2, 5, device="meta")), "k is on meta and q on cpu"),
    (dict(decay=torch.zeros(2, device="meta")), "decay is on meta"),
    (dict(decay="strong"), "decay must be a number or a tensor, not str"),
    (dict(q=torch.ones(2, 37, 2, 0), k=torch.ones(2, 37, 2, 0)), "at least one feature"),
    (dict(scale=float("inf")), "scale must be finite"),
    (dict(backend="fla"), "backend must be auto or one of triton, cpp, chunked, reference"),
])  # fmt: skip
def test_what_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        linear_attention(**{**make(), **change})


def test_a_gradient_of_another_shape_is_refused():
    data = make()
    with pytest.raises(ValueError, match="dstate must have shape"):
        linear_attention_backward(data["v"], **data, dstate=torch.zeros(2, 2, 3, 5))
    with pytest.raises(ValueError, match=r"dout must have shape \[2, 37, 2, 3\], not NoneType"):
        linear_attention_backward(None, **data)
    for wrong in (-0.1, torch.tensor([-0.1, -0.2])):
        with pytest.raises(ValueError, match="decay must be a tensor"):
            linear_attention_backward(data["v"], **data, decay=wrong)


def test_a_number_is_a_decay_of_all_heads():
    data = make()
    expected = linear_attention(**data, decay=torch.full((2,), math.log(0.9), dtype=F64))
    torch.testing.assert_close(linear_attention(**data, decay=math.log(0.9)), expected, rtol=1e-14, atol=1e-14)


def test_explain_names_every_backend():
    found = explain(**make(forget="head"))
    assert list(found) == ["triton", "cpp", "chunked", "reference"] and found["chunked"] is None and found["reference"] is None
