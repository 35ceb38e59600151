"""torch's own chunked `F.linear_cross_entropy` (torch 2.13 and later), where it means exactly the same.

It returns gradients of half-precision weights rounded to the weight's dtype after every chunk's addition or once at the end,
as its own `acc_policy` chooses; ours hands autograd the wide sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtrain.ops.linear_cross_entropy.call import Call, wide_dtype


def refuse(call: Call) -> str | None:
    """Why torch's op cannot serve `call`, or None."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy with chunking (2.13 has)"
    if call.options.softcap is not None:
        return "torch's F.linear_cross_entropy has no softcap"
    if call.options.z_loss:
        return "torch's F.linear_cross_entropy has no z_loss"
    if call.options.label_smoothing:
        return "torch's chunked F.linear_cross_entropy has no label smoothing"
    if call.token_weights_N is not None and call.scale is not None:
        return "torch's F.linear_cross_entropy has no token weights for a sum"
    if call.target_N.numel() == 0:
        return "there are no tokens"
    if call.input_NE.dtype not in (torch.float32, torch.float64):
        return f"its {call.input_NE.dtype} weight gradients are rounded to {call.input_NE.dtype}"
    return None


def run(call: Call) -> Tensor:
    from torch.nn import LinearCrossEntropyOptions

    chunk = LinearCrossEntropyOptions() if call.chunk_tokens is None else LinearCrossEntropyOptions(batch_chunk_size=call.chunk_tokens)
    loss = torch.nn.functional.linear_cross_entropy(
        call.input_NE, call.weight_VE, call.target_N, linear_bias=call.bias_V, ignore_index=call.options.ignore_index,
        reduction="none" if call.scale is None else "sum", options=chunk)
    loss = loss.to(wide_dtype(call.input_NE.dtype))
    if call.scale is not None:
        return loss * call.scale
    return loss if call.token_weights_N is None else loss * call.token_weights_N
