"""A linear layer whose products are made of 8-bit floats with one scale a row: token-local, so that it can be streamed.

Row-wise scaling (each token's activations, and each row or column of the weight, have their own scale) is a function of a token alone.
Tensor-wise and delayed scaling are not: their scale is taken over all tokens that are given, or over those of earlier calls, and changes
with the chunk; `lt.apply` finds that out in its proof and refuses such layers by name. For the same reason the weight's gradient, whose
rows are sums over tokens, is made in the input's own dtype (the recipe "rowwise, weight gradient in high precision").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


class FP8Linear(nn.Linear):
    """As `torch.nn.Linear`, same state: ``y = fp8(x) fp8(W)^T + b``, ``dx = fp8(dy) fp8(W)``, ``dW = dy^T x``. Lossy: 3 bits of mantissa.

    Weights stay in their dtype. On GPUs with FP8 units (sm_89 and later) the products are `torch._scaled_mm`'s, elsewhere emulated: the
    rounded numbers multiplied in float32 or wider.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if torch.is_autocast_enabled(x.device.type):
            x, weight = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, weight))
        y = _FP8Product.apply(x, weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _FP8Product(torch.autograd.Function):
    """``x [..., K]``, ``W [N, K]`` -> ``x W^T [..., N]``."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        return _product(x.flatten(0, -2), weight_NK).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight_NK = ctx.saved_tensors
        dx = _product(dy.flatten(0, -2), weight_NK.t()).unflatten(0, x.shape[:-1]) if ctx.needs_input_grad[0] else None
        dweight_NK = dy.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return dx, dweight_NK


def _rounded(a_MK: Tensor) -> tuple[Tensor, Tensor]:
    """(8-bit rows, their scales ``[M, 1]``): a ~ scale * rounded, the largest number of each row at the end of the range."""
    scale_M1 = (a_MK.abs().amax(dim=1, keepdim=True).to(torch.promote_types(a_MK.dtype, torch.float32)) / LARGEST).clamp_min(1e-30)
    return (a_MK / scale_M1).clamp(-LARGEST, LARGEST).to(FP8).contiguous(), scale_M1


def _product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """``a b^T`` of numbers rounded row by row, in a's dtype."""
    (a8, scale_a), (b8, scale_b) = _rounded(a_MK), _rounded(b_NK)
    by = _by_units if _has_fp8_units(a_MK, b_NK) else _emulated
    return by(a8, scale_a, b8, scale_b).to(a_MK.dtype)


def _by_units(a8_MK: Tensor, scale_a_M1: Tensor, b8_NK: Tensor, scale_b_N1: Tensor) -> Tensor:
    return torch._scaled_mm(a8_MK, b8_NK.t(), scale_a=scale_a_M1, scale_b=scale_b_N1.t().contiguous(), out_dtype=torch.bfloat16)


def _emulated(a8_MK: Tensor, scale_a_M1: Tensor, b8_NK: Tensor, scale_b_N1: Tensor) -> Tensor:
    wide = scale_a_M1.dtype
    return F.linear(a8_MK.to(wide), b8_NK.to(wide)) * scale_a_M1 * scale_b_N1.t()


def _has_fp8_units(a_MK: Tensor, b_NK: Tensor) -> bool:
    """Whether `_scaled_mm` serves this call: by device, dtype (its row-wise result is bfloat16) and multiples of 16."""
    fits = a_MK.dtype == torch.bfloat16 and a_MK.shape[1] % 16 == b_NK.shape[0] % 16 == 0
    return fits and a_MK.is_cuda and torch.cuda.get_device_capability(a_MK.device) >= (8, 9)
