"""PyTorch's own flash kernel on the CPU, made to serve chunks, documents and windows exactly (`pieces.py`).

`aten::_scaled_dot_product_flash_attention_for_cpu` returns the LSE and its backward takes `out` and `lse`; with the
global ones the gradient of a block of keys is exact. Its causality is aligned top-left, which for squares is right; a
window becomes strips of `STRIP` queries against their band of keys, under a mask of strip x band.

The kernel's bf16 backward accumulates into bf16, its error grows with length (dK/dV 1.2e-2 at 16K) and it is slower
than float32, so every piece is converted to the wide dtype, computed and accumulated there.
"""

from __future__ import annotations

import torch

from longtrain.ops.attention import pieces
from longtrain.ops.attention.call import AttentionCall
from longtrain.ops.attention.pieces import CAUSAL, FULL, Library, Piece

STRIP = 512
WIDEST_BAND = 8192

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def refuse(call: AttentionCall) -> str | None:
    """Why the call cannot be served exactly, or None."""
    if call.device.type != "cpu":
        return f"torch's CPU flash kernel: the tensors are on {call.device.type}"
    if (reason := pieces.refuse(call)) is not None:
        return reason
    if call.softcap is not None:
        return "no softcap"
    if call.scale <= 0:
        return "its causal mask is wrong unless the scale is positive"
    if call.windowed:
        left, right = call.left_reach(), call.right_reach()
        if left is None or right is None or left + right + STRIP > WIDEST_BAND:
            return f"windows only up to {WIDEST_BAND - STRIP} keys (mask memory)"
    return None


def _heads_first(call: AttentionCall, x_BTHD: torch.Tensor) -> torch.Tensor:
    """Wide, [B, H, T, D], kv heads repeated for their query heads."""
    return x_BTHD.to(call.wide).repeat_interleave(call.heads // x_BTHD.shape[2], dim=2).transpose(1, 2)


def _options(call: AttentionCall, piece: Piece) -> dict:
    if piece.window in (FULL, CAUSAL) and (piece.window == FULL or piece.queries == piece.keys):
        return {"is_causal": piece.window == CAUSAL, "attn_mask": None, "scale": call.scale}
    left, right = piece.window
    behind = torch.arange(piece.queries)[:, None] + piece.keys - piece.queries - torch.arange(piece.keys)
    hidden = (behind > left if left >= 0 else behind > piece.keys) | (-behind > right if right >= 0 else behind > piece.keys)
    mask = torch.zeros(hidden.shape, dtype=call.wide).masked_fill_(hidden, -torch.inf)
    return {"is_causal": False, "attn_mask": mask[None, None], "scale": call.scale}


def _forward(call: AttentionCall, piece: Piece, q, k, v):
    out, lse = _flash(*(_heads_first(call, x) for x in (q, k, v)), 0.0, **_options(call, piece))
    return out.transpose(1, 2), lse.transpose(1, 2)


def _backward(call: AttentionCall, piece: Piece, dout, q, k, v, out, lse):
    tensors = (_heads_first(call, x) for x in (dout, q, k, v, out))
    return tuple(x.transpose(1, 2) for x in _flash_backward(*tensors, lse.transpose(1, 2), 0.0, **_options(call, piece)))


LIBRARY = Library(forward=_forward, backward=_backward, aligned=False, packed=False, strip=STRIP)


def forward(call: AttentionCall, q, k, v, sink_logits):
    """q [B, T, H, D], k, v [B, S, K, D] -> out [B, T, H, D] in q's dtype, lse [B, T, H] wide."""
    return pieces.forward(call, LIBRARY, q, k, v, sink_logits)


def backward(call: AttentionCall, dout, q, k, v, out, lse, delta, dk, dv):
    """Adds into dk, dv [B, S, K, D] (wide), returns dq."""
    return pieces.backward(call, LIBRARY, dout, q, k, v, out, lse, dk, dv)
