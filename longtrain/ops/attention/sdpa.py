"""PyTorch's own flash kernel on the CPU, made to serve chunks, documents and windows exactly.

`aten::_scaled_dot_product_flash_attention_for_cpu` returns the LSE and its backward takes `out` and `lse`; with the
global ones the gradient of a block of keys is exact. A document becomes rectangular pieces, merged by LSE:

    chunk at an offset = prefix (every key visible) + diagonal square (top-left causal, which here is right)
    window             = strips of `STRIP` queries against their band of keys, under a mask of strip x band

The kernel's bf16 backward accumulates into bf16, its error grows with length (dK/dV 1.2e-2 at 16K) and it is slower
than float32, so every piece is converted to the wide dtype, computed and accumulated there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from longtrain.ops.attention.call import AttentionCall, Document
from longtrain.ops.attention.mask import visible
from longtrain.ops.attention.merge import merge_attention

STRIP = 512
WIDEST_BAND = 8192

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def refuse(call: AttentionCall) -> str | None:
    """Why the call cannot be served exactly, or None."""
    if call.device.type != "cpu":
        return f"torch's CPU flash kernel: the tensors are on {call.device.type}"
    if call.value_dim != call.head_dim:
        return f"value dim {call.value_dim} differs from head dim {call.head_dim}"
    if call.softcap is not None:
        return "no softcap"
    if call.scale <= 0:
        return "its causal mask is wrong unless the scale is positive"
    if call.dropout_p > 0:
        return "no counter-based dropout"
    if call.sink_tokens or call.stride:
        return "no sink tokens or strided blocks"
    if call.has_dlse:
        return "its backward takes no gradient of the LSE"
    if call.windowed:
        left, right = call.left_reach(), call.right_reach()
        if left is None or right is None or left + right + STRIP > WIDEST_BAND:
            return f"windows only up to {WIDEST_BAND - STRIP} keys (mask memory)"
    return None


class Piece(NamedTuple):
    rows: slice
    cols: slice
    diagonal: bool
    mask: torch.Tensor | None


def _pieces(call: AttentionCall, doc: Document):
    """Rectangles that cover the visible pairs of a document once; rows that see no key are in none."""
    if doc.k_start == doc.k_stop or doc.q_start == doc.q_stop:  # the kernel divides by zero on an empty side
        return
    shift = doc.q_shift - call.k_offset  # query i stands at key index i + shift
    if call.windowed:
        yield from _strips(call, doc, shift)
        return
    if not call.causal:
        yield Piece(slice(doc.q_start, doc.q_stop), slice(doc.k_start, doc.k_stop), False, None)
        return
    first = min(max(doc.q_start, doc.k_start - shift), doc.q_stop)
    last = min(max(first, doc.k_stop - shift), doc.q_stop)
    if first < last:
        if first + shift > doc.k_start:
            yield Piece(slice(first, last), slice(doc.k_start, first + shift), False, None)
        yield Piece(slice(first, last), slice(first + shift, last + shift), True, None)
    if last < doc.q_stop:
        yield Piece(slice(last, doc.q_stop), slice(doc.k_start, doc.k_stop), False, None)


def _strips(call: AttentionCall, doc: Document, shift: int):
    left, right = call.left_reach(), call.right_reach()
    first = max(doc.q_start, doc.k_start - shift - right)
    last = min(doc.q_stop, doc.k_stop - shift + left)
    for a in range(first, last, STRIP):
        b = min(a + STRIP, last)
        c, d = max(doc.k_start, a + shift - left), min(doc.k_stop, b + shift + right)
        q_pos = torch.arange(a, b) + doc.q_shift
        k_pos = torch.arange(c, d) + call.k_offset
        mask = torch.zeros(b - a, d - c, dtype=call.wide).masked_fill_(~visible(call, doc, q_pos, k_pos), -torch.inf)
        yield Piece(slice(a, b), slice(c, d), False, mask[None, None])


def _heads_first(x_BTHD: torch.Tensor, tokens: slice, wide: torch.dtype, repeat: int = 1) -> torch.Tensor:
    x = x_BTHD[:, tokens].to(wide)
    return (x if repeat == 1 else x.repeat_interleave(repeat, dim=2)).transpose(1, 2)


def forward(call: AttentionCall, q, k, v, sink_logits):
    """q [B, T, H, D], k, v [B, S, K, D] -> out [B, T, H, D] in q's dtype, lse [B, T, H] wide."""
    out = torch.zeros(call.batch, call.queries, call.heads, call.value_dim, dtype=call.wide)
    lse = torch.full((call.batch, call.queries, call.heads), -torch.inf, dtype=call.wide)
    for doc in call.documents:
        filled = slice(0, 0)
        for piece in _pieces(call, doc):
            q_piece = _heads_first(q, piece.rows, call.wide)
            k_piece = _heads_first(k, piece.cols, call.wide, call.group)
            v_piece = _heads_first(v, piece.cols, call.wide, call.group)
            out_b, lse_b = _flash(
                q_piece, k_piece, v_piece, 0.0, piece.diagonal, attn_mask=piece.mask, scale=call.scale
            )
            out_b, lse_b = out_b.transpose(1, 2), lse_b.transpose(1, 2)
            if piece.rows == filled:
                out_b, lse_b = merge_attention(out[:, piece.rows], lse[:, piece.rows], out_b, lse_b)
            out[:, piece.rows], lse[:, piece.rows] = out_b, lse_b
            filled = piece.rows
    if sink_logits is not None:
        # The sink only enlarges the denominator: out exp(lse) / (exp(lse) + exp(sink)).
        with_sink = torch.logaddexp(lse, sink_logits.to(call.wide))
        out *= torch.exp(lse - with_sink.masked_fill(with_sink == -torch.inf, 0))[..., None]
        lse = with_sink
    return out.to(q.dtype), lse


def backward(call: AttentionCall, dout, q, k, v, out, lse, delta, dk, dv):
    """Adds into dk, dv [B, S, K, D] (wide), returns dq."""
    dq = torch.zeros(call.batch, call.queries, call.heads, call.head_dim, dtype=call.wide)
    group = call.group
    for doc in call.documents:
        for piece in _pieces(call, doc):
            dq_b, dk_b, dv_b = _flash_backward(
                _heads_first(dout, piece.rows, call.wide),
                _heads_first(q, piece.rows, call.wide),
                _heads_first(k, piece.cols, call.wide, group),
                _heads_first(v, piece.cols, call.wide, group),
                _heads_first(out, piece.rows, call.wide),
                lse[:, piece.rows].transpose(1, 2),
                0.0, piece.diagonal, attn_mask=piece.mask, scale=call.scale,
            )
            dq[:, piece.rows] += dq_b.transpose(1, 2)
            dk[:, piece.cols] += dk_b.transpose(1, 2).unflatten(2, (call.kv_heads, group)).sum(3)
            dv[:, piece.cols] += dv_b.transpose(1, 2).unflatten(2, (call.kv_heads, group)).sum(3)
    return dq.to(q.dtype)
