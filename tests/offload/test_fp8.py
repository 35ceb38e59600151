"""The lossy codec keeps to its bound."""

import pytest
import torch

from longtrain.offload import DiskSettings, Place, TieredStore, fp8
from longtrain.span import Span
from tests.offload.stepped import Stepped

SHAPES = [(1, 5, 128), (2, 3, 300), (1, 7, 64), (1, 1, 1), (2, 4, 129)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 1e-6, 3e4])
def test_error_bound(shape, dtype, spread):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=g) * spread * torch.randn(shape, generator=g).exp()).to(dtype).clamp(-6e4, 6e4)
    y = fp8.decode(fp8.encode(x), x.shape, dtype)
    assert y.dtype == dtype and y.shape == x.shape
    x, y = x.double(), y.double()
    scale = torch.cat([part.abs().amax(-1, keepdim=True).expand_as(part) / 448 for part in x.split(128, dim=-1)], dim=-1)
    # e4m3 rounds to 3 bits of mantissa, or to 2^-9 below its smallest normal number; the scale and the product are rounded in float32, the
    # result in its dtype (float16: to 2^-24 below its own smallest normal number).
    rounded = torch.maximum(x.abs() * 2**-4, scale * 2**-10) * (1 + 2**-20)
    assert ((x - y).abs() <= rounded + (x.abs() + rounded) * torch.finfo(dtype).eps / 2 + 2**-25 * (dtype == torch.float16)).all()
    assert (x - y).abs().max() > 0 or x.numel() == 1


def test_a_quarter_of_the_bytes():
    x = torch.randn(1, 100, 1024)
    assert len(fp8.encode(x)) == x.numel() + 4 * x.numel() // 128


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(bad):
    x = torch.randn(1, 2, 256)
    x[0, 1, 3] = bad
    y = fp8.decode(fp8.encode(x), x.shape, x.dtype)
    assert y[0, 1, 3].isnan() and y[0, 0].isfinite().all() and y[0, 1, 128:].isfinite().all()


def test_zeros_and_other_dtypes():
    x = torch.zeros(1, 2, 130)
    assert torch.equal(fp8.decode(fp8.encode(x), x.shape, x.dtype), x)
    with pytest.raises(ValueError, match="float64.*without compress"):
        fp8.encode(x.double())


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_what_is_forwarded_is_what_is_read(tier):
    """The same lossy value whether the write was over or not, so that a result does not depend on the disk's speed."""
    x = torch.randn(1, 6, 200).transpose(0, 2).contiguous().transpose(0, 2)
    store = TieredStore("cpu", host_bytes=1 << 20, disk=DiskSettings(path="/", budget=1 << 20), staging_bytes=1 << 17, system=Stepped(0))
    store.put("x", Span(0, 6), x, Place(tier=tier, compress=True))
    first = store.get("x", Span(0, 6))
    store.settle()
    assert torch.equal(store.get("x", Span(2, 5)), first[:, 2:5]) and not torch.equal(first, x)
    assert (first - x).abs().max() < 0.3
    store.close()
