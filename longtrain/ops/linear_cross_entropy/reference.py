"""Cross entropy of a linear map, with all logits in memory. Plain torch, any dtype: the oracle of the other backends.

    s   = x W^T + b            z = softcap * tanh(s / softcap)          lse = log sum_v exp(z_v)
    l_i = lse - (1 - eps) z_target - (eps / V) sum_v z_v + z_loss * lse^2           times token weight i, 0 where ignored

Half-precision input is converted before the product, so that the result is that of exact arithmetic on rounded inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtrain.ops.linear_cross_entropy.call import Call, wide_dtype


def refuse(call: Call) -> str | None:
    """The reference serves every call."""
    return None


def token_losses(call: Call) -> Tensor:
    """Weighted loss of each token, [N], in the wide dtype."""
    options = call.options
    wide = wide_dtype(call.input_NE.dtype)
    bias = None if call.bias_V is None else call.bias_V.to(wide)
    z_NV = torch.nn.functional.linear(call.input_NE.to(wide), call.weight_VE.to(wide), bias)
    if options.softcap is not None:
        z_NV = options.softcap * torch.tanh(z_NV / options.softcap)
    valid_N = call.target_N != options.ignore_index
    target_N = call.target_N.where(valid_N, 0)
    lse_N = torch.logsumexp(z_NV, dim=-1)
    loss_N = lse_N - (1 - options.label_smoothing) * z_NV.gather(-1, target_N[:, None])[:, 0]
    if options.label_smoothing:
        loss_N = loss_N - options.label_smoothing * z_NV.mean(dim=-1)
    if options.z_loss:
        loss_N = loss_N + options.z_loss * lse_N.square()
    if call.token_weights_N is not None:
        loss_N = loss_N * call.token_weights_N.where(valid_N, 0)
    return loss_N.where(valid_N, 0)


def run(call: Call) -> Tensor:
    loss_N = token_losses(call)
    return loss_N if call.scale is None else loss_N.sum() * call.scale
