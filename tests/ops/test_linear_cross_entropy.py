"""The chunked and torch backends of `linear_cross_entropy` against the reference, which is itself held against torch's own loss."""

import pytest
import torch
from torch.nn import functional as F

from longtrain.ops.linear_cross_entropy import (
    LossOptions,
    chunk_loss_and_grad,
    chunked,
    explain,
    linear_cross_entropy,
    torch_core,
    workspace,
)

F64 = torch.float64
needs_torch_core = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch < 2.13 has no F.linear_cross_entropy"
)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()


def make(N=37, E=9, V=23, dtype=F64, bias=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, E, generator=g, dtype=F64).to(dtype).requires_grad_()
    w = torch.randn(V, E, generator=g, dtype=F64).to(dtype).requires_grad_()
    b = torch.randn(V, generator=g, dtype=F64).to(dtype).requires_grad_() if bias else None
    t = torch.randint(0, V, (N,), generator=g)
    t[torch.rand(N, generator=g) < 0.3] = -100
    if N > 1:
        t[0] = 1
    return x, w, b, t


def loss_and_grads(x, w, b, t, *, upstream=1.7, **options):
    leaves = [p.detach().clone().requires_grad_(p.requires_grad) for p in (x, w, b) if p is not None]
    loss = linear_cross_entropy(leaves[0], leaves[1], t, bias=leaves[2] if b is not None else None, **options)
    if loss.requires_grad:
        weights = (
            torch.full_like(loss, upstream) if loss.dim() == 0 else torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        )
        (loss * weights).sum().backward()
    return [loss.detach(), *(p.grad for p in leaves)]


def assert_same(ours, theirs, tolerance=1e-12):
    for name, a, b in zip(("loss", "dinput", "dweight", "dbias"), ours, theirs):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, name
            assert relative(a, b) <= tolerance, f"{name}: {relative(a, b):.2e}"


OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.5},
    "z_loss": {"z_loss": 0.03},
    "label_smoothing": {"label_smoothing": 0.1},
    "label_smoothing=1": {"label_smoothing": 1.0},
    "all": {"bias": True, "softcap": 2.0, "z_loss": 0.1, "label_smoothing": 0.2},
}


@pytest.mark.parametrize("weights", [False, True], ids=["", "token_weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunked_equals_reference(options, chunk, reduction, weights):
    options = dict(options)
    data = make(bias=options.pop("bias", False))
    if weights:
        options["token_weights"] = torch.randn(37, dtype=F64)
    ours = loss_and_grads(*data, **options, reduction=reduction, chunk_tokens=chunk, backend="chunked")
    assert_same(ours, loss_and_grads(*data, **options, reduction=reduction, backend="reference"))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_equals_torch_cross_entropy(reduction, label_smoothing):
    x, w, b, t = make(bias=True)
    ours = linear_cross_entropy(x, w, t, bias=b, reduction=reduction, label_smoothing=label_smoothing, backend="reference")
    theirs = F.cross_entropy(F.linear(x, w, b), t, reduction=reduction, label_smoothing=label_smoothing)
    assert relative(ours.detach(), theirs.detach()) <= 1e-14


def test_reference_softcap_and_z_loss_by_hand():
    x, w, _, _ = make(N=1, E=2, V=3)
    z = [2.0 * torch.tanh(s / 2.0) for s in (w @ x[0]).detach()]
    lse = torch.stack([v.exp() for v in z]).sum().log()
    ours = linear_cross_entropy(x, w, torch.tensor([2]), softcap=2.0, z_loss=0.25, backend="reference")
    assert ours.item() == pytest.approx((lse - z[2] + 0.25 * lse ** 2).item(), rel=1e-14)


@needs_torch_core
@pytest.mark.parametrize("normalizer", [None, 50, torch.tensor(50)], ids=["", "number", "tensor"])
@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_torch_core_equals_reference(bias, chunk, normalizer):
    data = make(bias=bias)
    ours = loss_and_grads(*data, normalizer=normalizer, chunk_tokens=chunk, backend="torch")
    assert_same(ours, loss_and_grads(*data, normalizer=normalizer, backend="reference"))


@needs_torch_core
def test_torch_core_per_token_with_weights():
    data = make()
    options = dict(reduction="none", token_weights=torch.randn(37, dtype=F64))
    assert_same(loss_and_grads(*data, **options, backend="torch"), loss_and_grads(*data, **options, backend="reference"))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_normalizer_divides_instead_of_the_valid_count(backend):
    x, w, _, t = make()
    total = linear_cross_entropy(x, w, t, reduction="sum", backend=backend).item()
    assert linear_cross_entropy(x, w, t, backend=backend).item() == pytest.approx(total / (t != -100).sum().item(), rel=1e-14)
    for normalizer in (7.5, torch.tensor(7.5)):
        assert linear_cross_entropy(x, w, t, normalizer=normalizer, backend=backend).item() == pytest.approx(total / 7.5, rel=1e-14)


@pytest.mark.parametrize("backend", ["chunked", "torch", "reference"])
@pytest.mark.parametrize("normalizer", [None, 0, 12])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_masked_is_zero_not_nan(backend, normalizer, reduction):
    if backend == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("torch < 2.13")
    if reduction == "none" and normalizer is not None:
        pytest.skip("a normalizer belongs to a mean")
    x, w, b, t = make(bias=True)
    loss, *grads = loss_and_grads(
        x, w, b, torch.full_like(t, -100), normalizer=normalizer, reduction=reduction, chunk_tokens=8, backend=backend
    )
    assert (loss == 0).all()
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("N", [0, 1])
def test_no_token_and_one_token(N):
    data = make(N=N)
    data[3].fill_(3)
    assert_same(loss_and_grads(*data, backend="chunked"), loss_and_grads(*data, backend="reference"))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["input", "weight", "both"])
def test_frozen_tensors_get_no_gradient_and_the_others_keep_theirs(frozen, reduction):
    x, w, b, t = make(bias=True)
    if frozen in ("input", "both"):
        x.requires_grad_(False)
    if frozen in ("weight", "both"):
        w.requires_grad_(False)
        b.requires_grad_(False)
    ours = loss_and_grads(x, w, b, t, reduction=reduction, chunk_tokens=8, backend="chunked")
    assert_same(ours, loss_and_grads(x, w, b, t, reduction=reduction, backend="reference"))
    assert (ours[1] is None) == (not x.requires_grad) and (ours[2] is None) == (not w.requires_grad)


def test_leading_axes_and_noncontiguous_input():
    x, w, _, t = make(N=30)
    whole = loss_and_grads(x, w, None, t, reduction="none", chunk_tokens=7)
    x_BTE = x.detach().view(5, 6, 9).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not x_BTE.is_contiguous()
    loss = linear_cross_entropy(x_BTE, w, t.view(5, 6), reduction="none", chunk_tokens=7)
    assert loss.shape == (5, 6)
    assert torch.equal(loss.detach().flatten(), whole[0])
    mean = linear_cross_entropy(x_BTE, w, t.view(5, 6), chunk_tokens=7)
    mean.backward()
    assert relative(x_BTE.grad.reshape(30, 9), loss_and_grads(x, w, None, t, upstream=1.0)[1]) < 1e-14


def test_ignore_index_inside_the_vocabulary():
    x, w, _, t = make()
    t = t.where(t != -100, 5)
    ours = loss_and_grads(x, w, None, t, ignore_index=5, backend="chunked")
    assert_same(ours, loss_and_grads(x, w, None, t.where(t != 5, -100), backend="reference"))


def test_weights_of_ignored_tokens_may_be_anything():
    x, w, _, t = make()
    weights = torch.rand(37, dtype=F64)
    poisoned = weights.where(t != -100, float("nan"))
    for backend in ("chunked", "reference"):
        for reduction in ("mean", "none"):
            ours = loss_and_grads(x, w, None, t, token_weights=poisoned, reduction=reduction, backend=backend)
            assert_same(ours, loss_and_grads(x, w, None, t, token_weights=weights, reduction=reduction, backend="reference"))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_an_entry_that_is_never_to_be_drawn_may_stand_at_an_ignored_token(backend, reduction):
    x, w, b, t = make(bias=True)
    t = t.where(t != 0, 1)
    with torch.no_grad():
        b[0] = float("-inf")  # a loss of entry 0, which an ignored target is read as, is infinite; 0 of it is not 0
    ours = loss_and_grads(x, w, b, t, reduction=reduction, backend=backend)
    theirs = F.cross_entropy(F.linear(x, w, b), t, reduction=reduction)
    assert (t == -100).any() and theirs.isfinite().all() and relative(ours[0], theirs) < 1e-14
    assert all(g.isfinite().all() for g in ours[1:])
    b = b.detach().clone().index_fill_(0, torch.tensor([0]), -1e4).requires_grad_()
    assert_same(ours, loss_and_grads(x, w, b, t, reduction=reduction))


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_large_logits_do_not_overflow(scale):
    x, w, _, t = make(dtype=torch.float32)
    big = (x.detach() * scale).requires_grad_()
    ours = loss_and_grads(big, w, None, t, chunk_tokens=8, backend="chunked")
    exact = loss_and_grads(big.detach().double().requires_grad_(), w.detach().double().requires_grad_(), None, t, backend="reference")
    assert relative(ours[0], exact[0]) < 1e-5
    assert relative(ours[2], exact[2]) < 1e-4


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_accumulate_wide(dtype, reduction):
    """More chunks than a half accumulator could survive; error no more than rounding the exact result, about."""
    data = make(N=300, E=16, V=1021, dtype=dtype)
    ours = loss_and_grads(*data, reduction=reduction, chunk_tokens=5, backend="chunked")
    exact = loss_and_grads(
        *(p.detach().double().requires_grad_() if p is not None and p.is_floating_point() else p for p in data),
        reduction=reduction,
        backend="reference",
    )
    assert ours[0].dtype == torch.float32 and relative(ours[0], exact[0]) < 1e-6
    for got, want in zip(ours[1:], exact[1:]):
        assert got.dtype == dtype
        assert relative(got, want) < 2 * relative(want.to(dtype), want) + 1e-6


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch without grad_dtype")
def test_float32_gradient_of_a_half_weight_arrives_unrounded():
    x, w, _, t = make(dtype=torch.bfloat16)
    exact = loss_and_grads(
        x.detach().double().requires_grad_(), w.detach().double().requires_grad_(), None, t, backend="reference", upstream=1.0
    )[2]
    w.grad_dtype = torch.float32
    linear_cross_entropy(x, w, t, backend="chunked").backward()
    assert w.grad.dtype == torch.float32 and relative(w.grad, exact) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_converts_like_linear(reduction):
    x, w, _, t = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_grads(x, w, None, t, reduction=reduction, chunk_tokens=8, backend="chunked")
        theirs = loss_and_grads(x, w, None, t, reduction=reduction, backend="reference")
    assert ours[1].dtype == torch.float32
    assert_same(ours, theirs, 1e-2)
    assert relative(ours[0], loss_and_grads(x, w, None, t, reduction=reduction)[0]) > 1e-5  # bf16 was really used


def test_second_backward_is_refused_and_per_token_allows_it():
    x, w, _, t = make()
    loss = linear_cross_entropy(x, w, t, backend="chunked")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()
    per_token = linear_cross_entropy(x, w, t, reduction="none", backend="chunked").sum()
    x.grad = None
    per_token.backward(retain_graph=True)
    once = x.grad.clone()
    per_token.backward()
    assert torch.equal(x.grad, 2 * once)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction):
    x, w, _, t = make()
    loss = linear_cross_entropy(x, w, t, reduction=reduction, backend="chunked").sum()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("position,value", [((2,), 23), ((0,), -1), ((1, 3), 10 ** 12)])
def test_target_outside_the_vocabulary_is_named(position, value):
    x, w, _, t = make(N=24)
    if len(position) == 2:
        x, t = x.detach().view(4, 6, 9), t.view(4, 6)
    t[position] = value
    with pytest.raises(ValueError, match=rf"position \(?{', '.join(map(str, position))}\)? is {value}, outside the vocabulary of 23"):
        linear_cross_entropy(x, w, t)


@pytest.mark.parametrize("bad,match", [
    (dict(reduction="average"), "reduction must be one of mean, sum, none"),
    (dict(backend="fast"), "backend must be auto or one of"),
    (dict(reduction="sum", normalizer=3), "no effect"),
    (dict(normalizer=0), "it must be positive"),
    (dict(normalizer=torch.ones(2)), "0-d"),
    (dict(softcap=0.0), "softcap must be None or positive"),
    (dict(z_loss=-1.0), "z_loss must be"),
    (dict(label_smoothing=1.5), r"label_smoothing must lie in \[0, 1\]"),
    (dict(chunk_tokens=0), "chunk_tokens must be at least 1"),
    (dict(token_weights=torch.ones(5)), "token_weights must have target's shape"),
    (dict(token_weights=torch.ones(37, requires_grad=True)), "token_weights are data"),
    (dict(bias=torch.ones(5)), "bias must have shape"),
    (dict(backend="torch", softcap=3.0), "has no softcap"),
    (dict(backend="torch", z_loss=0.1), "has no z_loss"),
    (dict(backend="torch", label_smoothing=0.1), "no label smoothing"),
])
def test_what_is_refused(bad, match):
    if bad.get("backend") == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        match = "torch"
    x, w, _, t = make()
    with pytest.raises(ValueError, match=match):
        linear_cross_entropy(x, w, t, **bad)


@pytest.mark.parametrize("change,match", [
    (lambda x, w, t: (x[:, :4], w, t), "do not fit"),
    (lambda x, w, t: (x, w, t[:5]), "target must have the shape"),
    (lambda x, w, t: (x, w, t.int()), "must be int64"),
    (lambda x, w, t: (x.float(), w, t), "share one floating dtype"),
])
def test_tensors_that_do_not_fit(change, match):
    x, w, _, t = make()
    with pytest.raises(ValueError, match=match):
        linear_cross_entropy(*change(x, w, t))


def test_explain_says_why_not():
    x, w, _, t = make()
    why = explain(x, w, t, softcap=3.0)
    assert list(why)[0] == "chunked" and why["chunked"] is None and why["reference"] is None
    assert why["torch"] is not None
    assert torch_core.refuse.__doc__


@pytest.mark.parametrize("options", [LossOptions(), LossOptions(z_loss=0.05, softcap=2.0)], ids=["plain", "z_loss, softcap"])
def test_one_chunk_primitive_adds_into_the_callers_accumulators(options):
    x, w, b, t = make(bias=True)
    weights = torch.rand(37, dtype=F64)
    dw, db = torch.full_like(w.detach(), 2.0), torch.full_like(b.detach(), 3.0)
    buffer = workspace(20, 23, "cpu", F64, options).fill_(float("nan"))
    scale = torch.tensor(0.25, dtype=F64)
    parts = [
        chunk_loss_and_grad(
            x.detach()[s],
            w.detach(),
            t[s],
            weights[s],
            scale,
            options,
            want_dx=True,
            dweight_VE=dw,
            bias_V=b.detach(),
            dbias_V=db,
            logits_buffer=buffer,
        )
        for s in (slice(20, 37), slice(0, 20))
    ]
    whole = loss_and_grads(x, w, b, t, upstream=1.0, token_weights=weights, normalizer=4, softcap=options.softcap, z_loss=options.z_loss,
                           backend="reference")
    assert_same([parts[0].loss + parts[1].loss, torch.cat([parts[1].dx_CE, parts[0].dx_CE]), dw - 2, db - 3], whole, 1e-13)
    if options.z_loss:
        without = linear_cross_entropy(x, w, t, bias=b, token_weights=weights, normalizer=4, softcap=options.softcap, backend="reference")
        assert (parts[0].loss + parts[1].loss - parts[0].z_loss - parts[1].z_loss).item() == pytest.approx(without.item(), rel=1e-12)
    else:
        assert parts[0].z_loss is None


def test_only_one_chunk_of_logits_exists():
    """No tensor larger than a chunk's logits is made, seen at the dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    x, w, _, t = make(N=640, E=4, V=512)
    for reduction in ("mean", "none"):
        with Largest() as seen:
            linear_cross_entropy(x, w, t, reduction=reduction, chunk_tokens=32, backend="chunked").sum().backward()
        assert seen.elements == 32 * 512


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_gradients_are_made_where_nobody_can_ask_for_them(reduction, monkeypatch):
    x, w, b, t = make(bias=True)
    expected = linear_cross_entropy(x, w, t, bias=b, reduction=reduction, backend="reference")
    monkeypatch.setattr(chunked, "_gradients", lambda *args: pytest.fail("a gradient was made"))
    with torch.no_grad():
        found = linear_cross_entropy(x, w, t, bias=b, reduction=reduction, backend="chunked", chunk_tokens=5)
    assert relative(found, expected) < 1e-14 and not found.requires_grad
