"""Joining attention over disjoint sets of keys by their log-sum-exps (FlashAttention-2, arXiv:2307.08691, section 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from longtrain.ops.attention.call import wrong


def merge_attention(out: Tensor, lse: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

        lse' = log(exp(lse) + exp(lse_b))        out' = exp(lse - lse') out + exp(lse_b - lse') out_b

    Args:
        out, out_b: [B, T, H, Dv]; lse, lse_b: [B, T, H]. Rows that saw no key (lse -inf) count as nothing.

    Returns:
        (out, lse), both in lse's wide dtype, so that further merges do not round. Differentiable.
    """
    for name, x, like in (("out_b", out_b, out), ("lse_b", lse_b, lse), ("lse", lse, out[..., 0])):
        if x.shape != like.shape:
            raise wrong(name, f"shape {tuple(x.shape)}", f"shape {tuple(like.shape)}")
    wide = torch.promote_types(lse.dtype, torch.float32)
    a, b = lse.to(wide), lse_b.to(wide)
    largest = torch.maximum(a, b).detach()
    largest = largest.masked_fill(largest == -torch.inf, 0)
    weight_a, weight_b = torch.exp(a - largest), torch.exp(b - largest)
    total = weight_a + weight_b
    divisor = total.masked_fill(total == 0, 1)
    merged = (weight_a / divisor)[..., None] * out.to(wide) + (weight_b / divisor)[..., None] * out_b.to(wide)
    return merged, largest + torch.log(total)
