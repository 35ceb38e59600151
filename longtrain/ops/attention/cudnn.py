"""cuDNN's attention through PyTorch, the fastest that torch brings for Hopper (566/470 TFLOP/s against flash's 306/166).

`aten::_scaled_dot_product_cudnn_attention` takes all pairs of a rectangle or the causal ones of a square, with GQA, and returns
the LSE; `_backward` takes out and lse. So a chunk at an offset is a prefix and a diagonal, merged (`pieces.py`). cuDNN builds a
plan for every shape it meets, once a process; in the backward, blocks of `KEY_BLOCK` keys bound the bf16 partials.
"""

from __future__ import annotations

import functools

import torch

from longtrain.ops.attention import pieces
from longtrain.ops.attention.call import AttentionCall
from longtrain.ops.attention.flash import refuse_call
from longtrain.ops.attention.pieces import CAUSAL, Library, Piece

KEY_BLOCK = 65536

_cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_cudnn_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


def refuse(call: AttentionCall) -> str | None:
    """Why the call cannot be served exactly, or None."""
    reason = refuse_call(call, oldest=(9, 0), head_dim=128)
    if reason is not None:
        return reason
    if torch.version.hip is not None or not torch.backends.cudnn.is_available() or torch.backends.cudnn.version() < 90100:
        return f"needs cuDNN 9.1 or later, found {torch.backends.cudnn.version()}"
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "torch.backends.cuda.enable_cudnn_sdp(False) was called"
    return refuse_shape(call)


def refuse_shape(call: AttentionCall) -> str | None:
    """The part of `refuse` that is the same on every machine."""
    if call.softcap is not None:
        return "no softcap"
    if call.deterministic or torch.are_deterministic_algorithms_enabled():
        return "its backward adds in no fixed order"
    if len(call.documents) > 16:
        return f"one call a document, and there are {len(call.documents)}"
    for piece in pieces.pieces(call, Library(forward=_forward, backward=_backward, aligned=True, packed=False)):
        if piece.window not in (pieces.FULL, CAUSAL):
            return "no windows"
    return "no single key" if any(piece.keys == 1 for piece in pieces.pieces(call, LIBRARY)) else None


def _heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [(x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in tensors]


@functools.cache
def _lse_axes(device: torch.device) -> int:
    """Axes of the LSE that this torch's kernel returns and takes, 3 or 4 ([B, H, T, 1]): asked, since versions differ."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    return _cudnn(x, x, x, None, True)[1].dim()


def _forward(call: AttentionCall, piece: Piece, q, k, v):
    out, lse, *_ = _cudnn(*_heads_first(q, k, v), None, True, 0.0, piece.window == CAUSAL, False, scale=call.scale)
    return out.transpose(1, 2), lse.view(lse.shape[:3]).transpose(1, 2)


def _backward(call: AttentionCall, piece: Piece, dout, q, k, v, out, lse):
    lse = lse.transpose(1, 2).contiguous()
    lse = lse if _lse_axes(q.device) == 3 else lse[..., None]
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    gradients = _cudnn_backward(
        *_heads_first(dout, q, k, v, out), lse, no_dropout, no_dropout, None, None, None, piece.queries, piece.keys, 0.0,
        piece.window == CAUSAL, scale=call.scale,
    )
    return tuple(x.transpose(1, 2) for x in gradients)


LIBRARY = Library(forward=_forward, backward=_backward, aligned=False, packed=False, key_block=KEY_BLOCK)


def forward(call: AttentionCall, q, k, v, sink_logits):
    """q [B, T, H, D], k, v [B, S, K, D] -> out [B, T, H, D] in q's dtype, lse [B, T, H] float32."""
    return pieces.forward(call, LIBRARY, q, k, v, sink_logits)


def backward(call: AttentionCall, dout, q, k, v, out, lse, delta, dk, dv):
    """Adds into dk, dv [B, S, K, D] (float32), returns dq."""
    return pieces.backward(call, LIBRARY, dout, q, k, v, out, lse, dk, dv)
