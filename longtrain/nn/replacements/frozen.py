"""Linear layers whose weights are kept in 8 or 4 bits, frozen: what adapters (LoRA) are trained beside.

Weights are cut into blocks of 64 along the input features, each with a scale, the block's largest magnitude. They are made whole again for
each product and let go behind it, forward and backward; activations are never rounded, so that a layer stays a function of each token and
can be streamed. Gradients go through to the input and not to the weight.

    lt.nn.freeze_linears(model, "nf4")                        # in place, the head left as it is
    model = peft.get_peft_model(model, peft.LoraConfig(...))
    lt.apply(model, plan)
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 64
Format = Literal["int8", "float8", "nf4"]
LARGEST = {"int8": 127.0, "float8": torch.finfo(torch.float8_e4m3fn).max, "nf4": 1.0}


class FrozenLinear(nn.Linear):
    """As the `torch.nn.Linear` it is made of, its weight (the parameter `weight`) in codes, with scales (the parameter `scale`)."""

    def __init__(self, linear: nn.Linear, format: Format) -> None:
        """Raises ValueError for a weight that is not floating-point, and for an odd number of input features where two share a byte."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.format = linear.in_features, linear.out_features, format
        codes, scale = quantized(linear.weight.detach(), format)
        self.weight, self.scale = nn.Parameter(codes, requires_grad=False), nn.Parameter(scale, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def whole_weight(self) -> Tensor:
        """``[out, in]`` in float32 or wider."""
        return dequantized(self.weight, self.scale, self.format)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _FrozenProduct.apply(x, self.weight, self.scale, self.format)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.format}"


class _FrozenProduct(torch.autograd.Function):
    """``x [..., K]``, codes and scales of ``W [N, K]`` -> ``x W^T [..., N]``; for the backward pass the codes are kept."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scale: Tensor, format: Format) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.format = format
        return F.linear(x, dequantized(codes, scale, format).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return dy @ dequantized(*ctx.saved_tensors, ctx.format).to(dy.dtype), None, None, None


def freeze_linears(model: nn.Module, format: Format) -> int:
    """Replace every `nn.Linear` of `model` but its head by a `FrozenLinear`, in place, and freeze all else; returns how many there were.

    Adapters come afterwards. Raises ValueError where there is none, and for weights that cannot be kept so.
    """
    if format not in LARGEST:
        raise ValueError(f"format must be one of {', '.join(LARGEST)}; found {format!r}")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]
    if not found:
        raise ValueError(f"{type(model).__name__} has no nn.Linear besides its head, and only those are kept in fewer bits")
    for name, module in found:
        try:
            model.set_submodule(name, FrozenLinear(module, format))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    model.requires_grad_(False)
    return len(found)


def quantized(weight_NK: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """(codes, scales ``[N, blocks]`` in the weight's dtype); rows whose length is no multiple of 64 are one block."""
    N, K = weight_NK.shape
    if not weight_NK.is_floating_point() or weight_NK.dtype.itemsize < 2:
        raise ValueError(f"its weight is {weight_NK.dtype} already; give a model in float32 or bfloat16")
    if format == "nf4" and K % 2:
        raise ValueError(f"nf4 puts two weights in a byte, and it has {K} input features; take int8")
    blocks_NGK = weight_NK.to(torch.promote_types(weight_NK.dtype, torch.float32)).unflatten(1, (-1, BLOCK if K % BLOCK == 0 else K))
    scale_NG = (blocks_NGK.abs().amax(-1) / LARGEST[format]).to(weight_NK.dtype)
    scale_NG.masked_fill_(scale_NG == 0, 1)  # a block of zeros
    rounded_NK = (blocks_NGK / scale_NG[..., None]).clamp(-LARGEST[format], LARGEST[format]).flatten(1)
    if format == "int8":
        return rounded_NK.round().to(torch.int8), scale_NG
    if format == "float8":
        return rounded_NK.to(torch.float8_e4m3fn), scale_NG
    levels = normal_levels(weight_NK.device)
    codes_NK = torch.bucketize(rounded_NK.float(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return (codes_NK[:, ::2] << 4) | codes_NK[:, 1::2], scale_NG


def dequantized(codes: Tensor, scale_NG: Tensor, format: Format) -> Tensor:
    """``[N, K]`` in float32, or the scales' dtype if that is wider."""
    wide = torch.promote_types(scale_NG.dtype, torch.float32)
    if format == "nf4":
        codes_NK = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1)
        weight_NK = normal_levels(codes.device)[codes_NK.int()].to(wide)
    else:
        weight_NK = codes.to(wide)
    blocks = scale_NG.shape[1]
    return (weight_NK.unflatten(1, (blocks, -1)) * scale_NG.to(wide)[..., None]).flatten(1)


def normal_levels(device: torch.device) -> Tensor:
    """The 16 levels of 4-bit NormalFloat, ``[-1, 1]``: quantiles of the normal distribution, as many weights to each, 8 above and 7 below
    zero, which is one itself (QLoRA, arXiv:2305.14314, section 3 and appendix E)."""
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    half = lambda count: torch.special.ndtri(torch.linspace(0.5, outermost, count, dtype=torch.float64))[1:]
    above, below = half(9), half(8)
    return torch.cat([-below.flip(0), above.new_zeros(1), above]).div(above[-1]).to(device, torch.float32)
