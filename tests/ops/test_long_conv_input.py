"""Bad input to `long_conv`: one ValueError that names the argument, what was found and what was expected. And NaN: where it may spread."""

import pytest
import torch

from longtrain.ops.long_conv import explain, long_conv, long_conv_2d

NAN, INF = float("nan"), float("inf")


def inputs(T=19, E=4, W=19, **changes):
    g = torch.Generator().manual_seed(0)
    given = dict(u=torch.randn(2, T, E, generator=g), k=torch.randn(E, W, generator=g))
    return given | changes


WRONG = [
    (dict(u=[1.0]), "u: found list, expected a tensor"),
    (dict(u=torch.ones(19, 4)), r"u: found shape \(19, 4\), expected 3 axes"),
    (dict(u=torch.ones(2, 19, 4, dtype=torch.int64)), "u: found torch.int64, expected float64, float32"),
    (dict(k=torch.ones(4, 3, dtype=torch.complex64)), "k: found torch.complex64"),
    (dict(k=torch.ones(3, 3)), "k: found 3 filters, expected one for each of u's 4 channels, or a divisor"),
    (dict(k=torch.ones(8, 3)), "k: found 8 filters"),
    (dict(k=torch.ones(0, 3)), "k: found 0 filters"),
    (dict(k=torch.ones(4, 0)), r"k: found shape \(4, 0\), expected 2 axes \[filters, taps\] and at least one tap"),
    (dict(k=torch.ones(4)), r"k: found shape \(4,\)"),
    (dict(k=torch.ones(4, 3, device="meta")), "k: found meta, expected u's device cpu"),
    (dict(skip=torch.ones(5)), r"skip: found shape \(5,\), expected shape \(4,\)"),
    (dict(skip=2.0), "skip: found float, expected a tensor"),
    (dict(gate_in=torch.ones(2, 18, 4)), r"gate_in: found shape \(2, 18, 4\), expected u's shape \(2, 19, 4\)"),
    (dict(gate_out=torch.ones(1, 19, 4)), "gate_out: found shape"),
    (dict(causal=None), "causal: found None, expected True or False"),
    (dict(cu_seqlens=[0, 19]), r"cu_seqlens: found \[0, 19\], expected an int32 or int64 tensor"),
    (dict(cu_seqlens=torch.tensor([0.0, 19.0])), "cu_seqlens: found torch.float32 of shape"),
    (dict(cu_seqlens=torch.tensor([0])), "cu_seqlens: found 1 entries, expected documents"),
    (dict(cu_seqlens=torch.tensor([1, 19])), "cu_seqlens: found first entry 1, expected 0"),
    (dict(cu_seqlens=torch.tensor([0, 18])), "cu_seqlens: found last entry 18, expected the number of tokens, 19"),
    (dict(cu_seqlens=torch.tensor([0, 8, 7, 19])), "cu_seqlens: found 7 after 8 at entry 2"),
    (dict(backend="monarch"), "backend: found 'monarch', expected 'auto' or one of 'cpp', 'triton', 'fft', 'reference'"),
    (dict(backend="cpp", gate_in=torch.ones(2, 19, 4, dtype=torch.bfloat16)), "backend: found 'cpp', expected another one, or 'auto'"),
]


@pytest.mark.parametrize("change,message", WRONG, ids=[message[:40] for _, message in WRONG])
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=f"long_conv: {message}"):
        long_conv(**inputs(**change))
    if "backend" not in change:
        with pytest.raises(ValueError, match=f"long_conv: {message}"):
            explain(**inputs(**change))


@pytest.mark.parametrize("change,message", [
    (dict(u=torch.ones(2, 5, 4)), r"u: found shape \(2, 5, 4\), expected 4 axes"),
    (dict(k=torch.ones(4, 3)), r"k: found shape \(4, 3\), expected 3 axes"),
    (dict(k=torch.ones(4, 3, 0)), "k: found shape"),
    (dict(k=torch.ones(3, 2, 2)), "k: found 3 filters"),
    (dict(gate_out=torch.ones(2, 5, 6, 3)), "gate_out: found shape"),
    (dict(gate_in=1.0), "gate_in: found float"),
])
def test_bad_images_are_named(change, message):
    with pytest.raises(ValueError, match=f"long_conv: {message}"):
        long_conv_2d(**(dict(u=torch.ones(2, 5, 6, 4), k=torch.ones(4, 3, 3)) | change))


@pytest.mark.parametrize("backend", ["auto", "fft"])
@pytest.mark.parametrize("T", [19, 700])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_tap_that_is_not_finite_is_refused(value, T, backend):
    data = inputs(T=T, W=T + 5)
    data["k"][2, 7] = value
    with pytest.raises(ValueError, match="long_conv: k: found a tap in row 2 that is not finite"):
        long_conv(**data, backend=backend)
    data["k"][2, 7] = 0
    data["k"][2, T] = value
    assert long_conv(**data, backend=backend).isfinite().all()  # it meets no token


@pytest.mark.parametrize("backend", ["auto", "fft"])
@pytest.mark.parametrize("T,W", [(40, 9), (900, 20), (900, 900), (5000, 300)])
def test_nan_stays_in_its_channel_and_document(T, W, backend):
    data = inputs(T=T, W=W, gate_in=torch.ones(2, T, 4), gate_out=torch.ones(2, T, 4), skip=torch.ones(4))
    half = T // 2 + 1
    data["u"][1, half + 3, 2] = NAN
    leaves = {name: x.requires_grad_() for name, x in data.items()}
    y = long_conv(**leaves, cu_seqlens=torch.tensor([0, half, T]), backend=backend)
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))))
    touched = torch.zeros(2, T, 4, dtype=torch.bool)
    touched[1, half:, 2] = True
    assert y[1, half + 3, 2].isnan() and grads["k"][2].isnan().any() and grads["skip"][2].isnan()
    for x in (y, grads["u"], grads["gate_in"], grads["gate_out"]):
        assert not x[~touched].isnan().any()
    for x in (grads["k"], grads["skip"]):
        assert not x[[0, 1, 3]].isnan().any()
