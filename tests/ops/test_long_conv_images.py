"""`long_conv_2d` against torch's own convolution and against its definition."""

import math

import pytest
import torch
import torch.nn.functional as F

from longtrain.ops.long_conv import long_conv_2d
from tests.ops.test_long_conv import relative

F64 = torch.float64


@pytest.mark.parametrize("V,W", [(1, 1), (3, 3), (5, 3), (4, 6), (13, 9), (2, 30)])
@pytest.mark.parametrize("Y,X", [(7, 6), (1, 5), (5, 1), (1, 1)])
def test_equals_its_definition(Y, X, V, W):
    """By torch's conv2d (a correlation) with the filter turned around; even filters have one lag more to the left and up."""
    g = torch.Generator().manual_seed(0)
    u, k, dy = (torch.randn(*shape, generator=g, dtype=F64) for shape in ((2, Y, X, 3), (3, V, W), (2, Y, X, 3)))
    grads = []
    for attempt in ("ours", "torch"):
        a, b = u.clone().requires_grad_(), k.clone().requires_grad_()
        if attempt == "ours":
            y = long_conv_2d(a, b)
        else:
            # Lags run from -(V // 2) to (V - 1) // 2, so that y_i = sum over s of centred_s u_{i + V // 2 - s}.
            centred = torch.fft.fftshift(b, (-2, -1))
            padded = F.pad(a.permute(0, 3, 1, 2), ((W - 1) // 2, W // 2, (V - 1) // 2, V // 2))
            y = F.conv2d(padded, centred.flip(-2, -1)[:, None], groups=3).permute(0, 2, 3, 1)
        grads.append([y.detach(), *torch.autograd.grad(y, (a, b), dy)])
    for ours, theirs in zip(*grads):
        assert relative(ours, theirs) < 1e-13


def test_gates_skip_and_heads():
    g = torch.Generator().manual_seed(0)
    u, gate_in, gate_out = (torch.randn(1, 6, 5, 4, generator=g, dtype=F64) for _ in range(3))
    k, skip = torch.randn(2, 3, 3, generator=g, dtype=F64), torch.randn(4, generator=g, dtype=F64)
    plain = long_conv_2d(u * gate_in, k.repeat_interleave(2, 0))
    assert relative(long_conv_2d(u, k, skip, gate_in, gate_out), gate_out * (plain + skip * u * gate_in)) < 1e-14


@pytest.mark.parametrize("shape", [(1, 0, 5, 4), (1, 5, 0, 4), (0, 5, 5, 4)])
def test_empty_images(shape):
    k = torch.ones(4, 3, 3, requires_grad=True)
    y = long_conv_2d(torch.ones(shape), k)
    assert y.shape == shape
    y.sum().backward()
    assert torch.equal(k.grad, torch.zeros_like(k))


def test_compiled_whole_without_breaks():
    def gradients(f):
        leaves = [torch.linspace(-1, 1, math.prod(shape)).view(shape).requires_grad_() for shape in ((1, 6, 5, 4), (2, 3, 4), (4,))]
        y = f(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    torch._dynamo.reset()
    compiled = torch.compile(lambda u, k, skip: long_conv_2d(u, k, skip, u), fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled), gradients(lambda u, k, skip: long_conv_2d(u, k, skip, u))):
        assert torch.equal(a, b)
