"""Linear layers in 8-bit floats: row-wise scaling streams exactly; scales over all tokens, or over earlier calls, are refused by name."""

import hf_families
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import longtrain as lt
from longtrain.nn.replacements.fp8 import FP8, LARGEST, _by_units, _emulated, _rounded

PLAN = lt.Plan(chunk_tokens=8, loss_chunk_tokens=8)


class Scaled(nn.Linear):
    """Activations rounded to 8 bits under one scale, with gradients as if they were not."""

    def forward(self, x):
        scale = self.scale(x)
        rounded = (x / scale).clamp(-LARGEST, LARGEST).to(FP8).to(x.dtype) * scale
        return F.linear(x + (rounded - x).detach(), self.weight, self.bias)


class TensorWise(Scaled):
    def scale(self, x):
        return x.detach().abs().amax() / LARGEST


class Delayed(Scaled):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("history", torch.ones(4))

    def scale(self, x):
        scale = self.history.amax() / LARGEST
        self.history.copy_(torch.cat([x.detach().abs().amax()[None], self.history[:-1]]))
        return scale


class GradientAcrossTokens(lt.nn.FP8Linear):
    """Row-wise in all three products: rows of the weight's gradient are sums over tokens, and so are their scales."""

    def forward(self, x):
        weight = self.weight * 1.0
        if weight.requires_grad:
            weight.register_hook(lambda grad: (grad / grad.abs().amax(1, keepdim=True)).to(FP8).to(grad.dtype))
        return F.linear(x, weight)


def with_linears(kind, where="mlp"):
    model = hf_families.build("llama")
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and where in name:
            made = kind(module.in_features, module.out_features, module.bias is not None, dtype=torch.float64)
            made.load_state_dict(module.state_dict(), strict=False)
            model.set_submodule(name, made)
    return model


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_rows_do_not_depend_on_each_other(dtype, bound):
    linear = lt.nn.FP8Linear(24, 16, dtype=dtype)
    x = torch.randn(2, 11, 24, dtype=dtype) * torch.logspace(-6, 6, 11, dtype=dtype)[:, None]  # tokens of all magnitudes
    whole, exact = linear(x), F.linear(x, linear.weight, linear.bias)
    parts = torch.cat([linear(part) for part in x.split(3, dim=1)], dim=1)
    assert ((parts - whole).norm(dim=-1) <= bound * whole.norm(dim=-1)).all()
    error = (whole - exact).norm(dim=-1) / exact.norm(dim=-1)
    # 3 bits of mantissa on both sides, a sum of 24 with random signs
    assert (error < 0.15).all() and error.mean() > 1e-3
    assert linear.state_dict().keys() == nn.Linear(24, 16).state_dict().keys()


def test_the_call_of_the_8_bit_units_is_the_emulated_product():
    """torch._scaled_mm runs on CPUs too, slowly; also with a transposed weight, as in the backward pass."""
    for b in (torch.randn(32, 48), torch.randn(48, 32).t()):
        rounded = (*_rounded(torch.randn(16, 48)), *_rounded(b))
        by_units, emulated = _by_units(*rounded).float(), _emulated(*rounded)
        assert (by_units - emulated).norm() <= 2**-8 * emulated.norm()  # its result is bfloat16


def test_gradients_are_those_of_the_formulas():
    linear, x, dy = lt.nn.FP8Linear(24, 16).double(), torch.randn(7, 24).double().requires_grad_(), torch.randn(7, 16).double()
    linear(x).backward(dy)

    def rounded(a):
        scale = a.abs().amax(1, keepdim=True) / LARGEST
        return (a / scale).to(FP8).double() * scale

    torch.testing.assert_close(x.grad, rounded(dy) @ rounded(linear.weight.detach().t()).t(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(linear.weight.grad, dy.t() @ x.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(linear.bias.grad, dy.sum(0), rtol=1e-12, atol=1e-14)


def test_row_wise_scaling_streams_as_it_runs_unstreamed():
    model, batch = with_linears(lt.nn.FP8Linear, where="proj"), dict(hf_families.batches())["packed"]
    own, exact = (hf_families.gradients(m, batch, use_cache=False) for m in (model, hf_families.build("llama")))
    assert hf_families.difference(own, exact) > 1e-2, "8 bits had no effect"
    report = lt.apply(model, PLAN)
    report.check_replay()
    assert all(entry.why == "" for entry in report.entries)
    assert hf_families.difference(hf_families.gradients(model, batch), own) <= 1e-6


@pytest.mark.parametrize("kind, message", [
    (TensorWise, r"mlp.gate_proj \(TensorWise\) does, by its output.*tensor-wise scaling: use row-wise scaling"),
    (Delayed, r"buffers in forward.*mlp.gate_proj.history of Delayed.*delayed scaling.*use row-wise scaling"),
    (GradientAcrossTokens, r"mlp.gate_proj \(GradientAcrossTokens\) does, by its parameter gradients.*weight gradients in high precision"),
])
def test_other_scalings_are_refused_by_name(kind, message):
    model = with_linears(kind)
    with pytest.raises(ValueError, match=r"layers.0 cannot be streamed.*" + message):
        lt.apply(model, PLAN)
    report = lt.apply(with_linears(kind, where="layers.1.mlp"), lt.Plan(chunk_tokens=8, layer_fallback="unstreamed"))
    assert [entry.name for entry in report.entries if entry.why] == ["model.layers.1"]
