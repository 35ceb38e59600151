"""`long_conv` by torch.fft against its definition, and the definition against loops a person can check."""

import numpy
import pytest
import torch

from longtrain._extension import MISSING
from longtrain.ops.long_conv import explain, fft, long_conv
from longtrain.ops.long_conv.fft import transform_size

F64 = torch.float64
CASES = {
    "plain": {},
    "skip": {"skip": True},
    "gate_in": {"gate_in": True},
    "gate_out": {"gate_out": True},
    "all": {"skip": True, "gate_in": True, "gate_out": True},
}


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()


def make(B=2, T=19, E=5, W=19, dtype=F64, skip=False, gate_in=False, gate_out=False, seed=0, H=None):
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=F64).to(dtype).requires_grad_()

    return dict(u=random(B, T, E), k=random(H or E, W), skip=random(E) if skip else None, gate_in=random(B, T, E) if gate_in else None,
                gate_out=random(B, T, E) if gate_out else None)


def output_and_grads(data, **options):
    leaves = {n: None if p is None else p.detach().clone().requires_grad_(p.requires_grad) for n, p in data.items()}
    y = long_conv(**leaves, **options)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).cos())
    return {"y": y.detach(), **{n: p.grad for n, p in leaves.items() if p is not None}}


def assert_same(ours, theirs, tolerance=1e-12):
    for name in theirs:
        assert (ours[name] is None) == (theirs[name] is None), name
        if ours[name] is not None:
            assert ours[name].dtype == theirs[name].dtype, name
            assert relative(ours[name], theirs[name]) <= tolerance, f"{name}: {relative(ours[name], theirs[name]):.2e}"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "T,W", [(19, 19), (19, 1), (19, 2), (19, 7), (19, 8), (19, 37), (19, 38), (19, 60), (1, 1), (1, 5), (1, 2), (64, 64), (63, 128)]
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fft_equals_reference(case, T, W, causal):
    data = make(T=T, W=W, **case)
    assert_same(output_and_grads(data, causal=causal, backend="fft"), output_and_grads(data, causal=causal, backend="reference"))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("H", [1, 2, 3, 6])
def test_filters_of_heads_equal_filters_repeated(H, causal):
    data = make(E=6, H=H, **CASES["all"])
    per_channel = {**data, "k": data["k"].detach().repeat_interleave(6 // H, 0).requires_grad_()}
    expected = output_and_grads(per_channel, causal=causal, backend="reference")
    expected["k"] = expected["k"].view(H, 6 // H, -1).sum(1)
    for backend in ("fft", "reference", "auto"):
        assert_same(output_and_grads(data, causal=causal, backend=backend), expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("edges", [[0, 7, 19], [0, 1, 2, 19], [0, 0, 5, 5, 19, 19]])
def test_documents_equal_separate_calls(edges, causal):
    data = make(**CASES["all"], W=25)
    packed = output_and_grads(data, causal=causal, cu_seqlens=torch.tensor(edges), backend="fft")
    assert_same(packed, output_and_grads(data, causal=causal, cu_seqlens=torch.tensor(edges, dtype=torch.int32), backend="reference"))
    for start, stop in zip(edges, edges[1:]):
        alone = long_conv(*(p[:, start:stop] if p.dim() == 3 else p for p in data.values()), causal=causal)
        assert torch.allclose(packed["y"][:, start:stop], alone, rtol=1e-12, atol=1e-12)


def test_reference_by_hand():
    u, k, skip, gate_in, gate_out = (p.detach() for p in make(B=1, T=4, E=1, W=3, **CASES["all"]).values())
    v = (u * gate_in)[0, :, 0].tolist()
    a, b, c = k[0].tolist()
    past = [a * v[0], a * v[1] + b * v[0], a * v[2] + b * v[1] + c * v[0], a * v[3] + b * v[2] + c * v[1]]
    both = [a * v[0] + c * v[1], a * v[1] + b * v[0] + c * v[2], a * v[2] + b * v[1] + c * v[3], a * v[3] + b * v[2]]
    for causal, conv in ((True, past), (False, both)):
        want = [(y + skip.item() * x) * g for y, x, g in zip(conv, v, gate_out[0, :, 0].tolist())]
        got = long_conv(u, k, skip, gate_in, gate_out, causal=causal, backend="reference")[0, :, 0].tolist()
        assert got == pytest.approx(want, rel=1e-14)


def test_two_sided_takes_the_filters_of_m2_bert_and_flashfftconv():
    """M2-BERT: a filter of length 2T, `pad(k, (0, T)) + pad(k_rev.flip(-1), (T, 0))`, multiplied in a transform of size 2T."""
    data = make(T=16, W=16)
    u, k = data["u"].detach(), data["k"].detach()
    k_rev = torch.randn(5, 16, dtype=F64)
    both = torch.nn.functional.pad(k, (0, 16)) + torch.nn.functional.pad(k_rev.flip(-1), (16, 0))
    theirs = torch.fft.irfft(torch.fft.rfft(u.transpose(1, 2), n=32) * torch.fft.rfft(both, n=32), n=32)[..., :16].transpose(1, 2)
    assert relative(long_conv(u, torch.cat([k, k_rev.flip(-1)], -1), causal=False), theirs) < 1e-13


@pytest.mark.parametrize("W", [7, 8, 37])
def test_two_sided_takes_centred_filters_after_ifftshift(W):
    u, k = (p.detach() for p in list(make(W=W).values())[:2])
    y = long_conv(u, torch.fft.ifftshift(k, -1), causal=False)
    for channel in range(5):
        full = numpy.convolve(u[0, :, channel], k[channel])
        assert torch.allclose(y[0, :, channel], torch.from_numpy(full[W // 2:W // 2 + 19]), rtol=1e-12, atol=1e-12)


def test_causal_does_not_see_the_future_and_two_sided_does():
    data = make()
    for causal in (True, False):
        u = data["u"].detach().clone().requires_grad_()
        long_conv(u, data["k"], causal=causal, backend="fft")[:, 7].sum().backward()
        assert u.grad[:, :8].abs().min() > 1e-3
        assert (u.grad[:, 8:].abs().max() > 1e-3) == (not causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_types_compute_in_float32(dtype):
    data = make(T=300, W=300, E=9, dtype=dtype, **CASES["all"])
    ours = output_and_grads(data, backend="fft")
    wide = output_and_grads({n: p.detach().double().requires_grad_() for n, p in data.items()}, backend="reference")
    for name in ours:
        assert ours[name].dtype == dtype
        assert relative(ours[name], wide[name]) < 2 * torch.finfo(dtype).eps + 1e-6, name


def test_float32_filter_of_half_input_gets_a_float32_gradient():
    data = make(T=64, dtype=torch.bfloat16)
    data["k"] = data["k"].detach().float().requires_grad_()
    ours = output_and_grads(data, backend="fft")
    assert ours["y"].dtype == torch.bfloat16 and ours["k"].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(output_and_grads(data, backend="fft"), ours, 0)


@pytest.mark.parametrize("frozen", ["u", "k", "skip", "gate_in", "gate_out"])
def test_frozen_tensors(frozen):
    data = make(**CASES["all"])
    data[frozen].requires_grad_(False)
    ours = output_and_grads(data, backend="fft")
    assert ours[frozen] is None
    assert_same(ours, output_and_grads(data, backend="reference"))


@pytest.mark.parametrize("channels", [1, 3])
def test_blocks_of_channels_do_not_change_the_result(channels, monkeypatch):
    data = make(E=7, **CASES["all"])
    whole = output_and_grads(data, backend="fft")
    monkeypatch.setattr(fft, "_block_channels", lambda *a: channels)
    assert_same(output_and_grads(data, backend="fft"), whole, 1e-15)


def test_saves_the_inputs_only():
    data = make(**CASES["all"])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        long_conv(**data, backend="fft")
    assert {t.data_ptr() for t in saved} == {p.data_ptr() for p in data.values()}


def test_noncontiguous_input():
    data = make()
    u = data["u"].detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(long_conv(u, data["k"]), long_conv(data["u"], data["k"]))


@pytest.mark.parametrize("backend", ["auto", "fft"])
def test_gradients_lie_as_the_compiler_is_told_they_do(backend):
    """Contiguous, also where the inputs are not."""
    data = {name: p.detach() if p.dim() < 3 else p.detach().transpose(0, 1).contiguous().transpose(0, 1)
            for name, p in make(**CASES["all"]).items()}
    u, k, skip, gate_in, gate_out = data.values()
    call = (u, k, skip, gate_in, gate_out, None, True, backend)
    assert not u.is_contiguous()
    torch.library.opcheck(torch.ops.longtrain.long_conv, call, test_utils=["test_schema", "test_faketensor"])
    found = torch.ops.longtrain.long_conv_backward(u, *call, [True] * 5)
    assert all(gradient.is_contiguous() for gradient in found)


def test_transform_size_is_even_and_large_enough():
    for length in (1, 2, 3, 5, 17, 640, 641, 1000, 4097):
        for past, future in ((1, 0), (length, 0), (min(3, length), length - 1)):
            size, needed = transform_size(length, past, future), length + max(past - 1, future)
            assert size % 2 == 0 and needed <= size <= max(2, 1.5 * needed + 1), (length, past, future, size)


def test_second_derivatives_are_refused():
    data = make()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(long_conv(**data).sum(), data["u"], create_graph=True)
    first = torch.autograd.grad(long_conv(**data, backend="reference").square().sum(), data["u"], create_graph=True)[0]
    assert torch.autograd.grad(first.sum(), data["u"])[0].abs().min() > 0


def test_explain_names_every_backend():
    found = explain(**make())
    assert list(found) == ["cpp", "triton", "fft", "reference"] and found["fft"] is None and found["reference"] is None
    assert "is torch.float32" in explain(**(make(**CASES["gate_in"]) | {"gate_in": torch.ones(2, 19, 5)}))["cpp"] or MISSING
