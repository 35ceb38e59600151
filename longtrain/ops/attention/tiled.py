"""Attention in plain torch with bounded memory, any device, every option: the path without a compiler.

Query tiles outside, key tiles inside, online softmax (FlashAttention-2, arXiv 2307.08691, algorithm 1), tiles that the
mask excludes skipped. The formulas are those of `reference.py`. A tile of scores holds at most `TILE_ELEMENTS`, so the
workspace is a few times 16 MB whatever the length.
"""

from __future__ import annotations

import torch

from longtrain.ops.attention.call import AttentionCall, Document
from longtrain.ops.attention.mask import dropout_keep, masked_matmul, tile_visibility, visible

TILE_ELEMENTS = 2**22


def refuse(call: AttentionCall) -> str | None:
    """Serves everything."""
    return None


def _tile_side(call: AttentionCall) -> int:
    side = int((TILE_ELEMENTS / max(1, call.batch * call.heads)) ** 0.5)
    return min(1024, max(16, side))


def _folded(x_BTHD: torch.Tensor, kv_heads: int, wide: torch.dtype) -> torch.Tensor:
    """[B, T, H, D] -> wide [B, K, G, T, D]: the query heads of one kv head side by side."""
    return x_BTHD.to(wide).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _unfolded(x_BKGTD: torch.Tensor) -> torch.Tensor:
    return x_BKGTD.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _tiles(call: AttentionCall, doc: Document, side: int):
    """(query slice, its visible key slices), the keys each with "all" or "some"."""
    for a in range(doc.q_start, doc.q_stop, side):
        b = min(a + side, doc.q_stop)
        keys = []
        for c in range(doc.k_start, doc.k_stop, side):
            d = min(c + side, doc.k_stop)
            seen = tile_visibility(
                call, doc, a + doc.q_shift, b + doc.q_shift, c + call.k_offset, d + call.k_offset
            )
            if seen != "none":
                keys.append((slice(c, d), seen))
        yield slice(a, b), keys


def _tile_scores(call: AttentionCall, doc: Document, q_BKGTD, k_BK1SD, rows: slice, cols: slice, seen: str):
    """Capped scores of a tile (-inf where masked), its mask (None: all visible) and its dropout factor or None."""
    device = q_BKGTD.device
    q_pos = torch.arange(rows.start, rows.stop, device=device) + doc.q_shift
    k_pos = torch.arange(cols.start, cols.stop, device=device) + call.k_offset
    c = (q_BKGTD @ k_BK1SD.transpose(3, 4)).mul_(call.scale)
    if call.softcap is not None:
        c = c.div_(call.softcap).tanh_().mul_(call.softcap)
    allowed = None
    if seen == "some":
        allowed = visible(call, doc, q_pos, k_pos)
        c = c.masked_fill_(~allowed, -torch.inf)
    factor = None
    if call.dropout_p > 0:
        batch, head = torch.arange(call.batch, device=device), torch.arange(call.heads, device=device)
        keep = dropout_keep(call, batch, head, q_pos, k_pos)
        factor = keep.to(c.dtype).div_(1 - call.dropout_p).unflatten(1, (call.kv_heads, call.group))
    return c, allowed, factor


def forward(call: AttentionCall, q, k, v, sink_logits):
    """q [B, T, H, D], k [B, S, K, D], v [B, S, K, Dv] -> out [B, T, H, Dv] in q's dtype, lse [B, T, H] wide."""
    B, K, G, V, wide = call.batch, call.kv_heads, call.group, call.value_dim, call.wide
    out = torch.empty(B, call.queries, call.heads, V, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, call.queries, call.heads, dtype=wide, device=q.device)
    side = _tile_side(call)
    for doc in call.documents:
        for rows, keys in _tiles(call, doc, side):
            T = rows.stop - rows.start
            q_tile = _folded(q[:, rows], K, wide)
            m = torch.full((B, K, G, T, 1), -torch.inf, dtype=wide, device=q.device)
            if sink_logits is not None:
                m = m.copy_(sink_logits.to(wide).view(K, G, 1, 1))
            # A row that has seen nothing keeps m = -inf; the finite stand-in makes exp(-inf - 0) = 0, not NaN.
            total = torch.exp(m - _finite(m))
            acc = torch.zeros(B, K, G, T, V, dtype=wide, device=q.device)
            for cols, seen in keys:
                k_tile = _folded(k[:, cols], K, wide)
                v_tile = _folded(v[:, cols], K, wide)
                c, allowed, factor = _tile_scores(call, doc, q_tile, k_tile, rows, cols, seen)
                m_new = torch.maximum(m, c.amax(-1, keepdim=True))
                p = c.sub_(_finite(m_new)).exp_()
                rescale = torch.exp(m - _finite(m_new))
                total = total * rescale + p.sum(-1, keepdim=True)
                acc = acc * rescale + masked_matmul(p if factor is None else p.mul_(factor), v_tile, allowed)
                m = m_new
            empty = total == 0
            out[:, rows] = _unfolded(acc.div_(total.masked_fill(empty, 1))).to(out.dtype)
            lse[:, rows] = _unfolded(_finite(m) + torch.log(total)).squeeze(-1)
    return out, lse


def _finite(m: torch.Tensor) -> torch.Tensor:
    return m.masked_fill(m == -torch.inf, 0)


def backward(call: AttentionCall, dout, q, k, v, out, lse, delta, dk, dv):
    """Adds into dk [B, S, K, D] and dv [B, S, K, Dv] (wide), returns dq. delta [B, T, H] as in `reference.py`."""
    K, wide = call.kv_heads, call.wide
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    side = _tile_side(call)
    for doc in call.documents:
        for rows, keys in _tiles(call, doc, side):
            q_tile = _folded(q[:, rows], K, wide)
            do_tile = _folded(dout[:, rows], K, wide)
            lse_tile = _folded(lse[:, rows, :, None], K, wide)
            delta_tile = _folded(delta[:, rows, :, None], K, wide)
            dq_tile = torch.zeros_like(q_tile)
            for cols, seen in keys:
                k_tile = _folded(k[:, cols], K, wide)
                v_tile = _folded(v[:, cols], K, wide)
                c, allowed, factor = _tile_scores(call, doc, q_tile, k_tile, rows, cols, seen)
                p = torch.exp(c - lse_tile)
                dp = do_tile @ v_tile.transpose(3, 4)
                if factor is not None:
                    dp.mul_(factor)
                ds = dp.sub_(delta_tile).mul_(p)
                if call.softcap is not None:
                    ds.mul_(1 - (c / call.softcap).square())
                if factor is not None:
                    p = p.mul_(factor)
                if allowed is not None:
                    p, ds = p.masked_fill(~allowed, 0), ds.masked_fill(~allowed, 0)
                seen_by = None if allowed is None else allowed.T
                dq_tile += masked_matmul(ds, k_tile, allowed)
                dk_tile = masked_matmul(ds.transpose(3, 4), q_tile, seen_by).sum(2).mul_(call.scale)
                dv_tile = masked_matmul(p.transpose(3, 4), do_tile, seen_by).sum(2)
                dk[:, cols] += dk_tile.transpose(1, 2)
                dv[:, cols] += dv_tile.transpose(1, 2)
            dq[:, rows] = _unfolded(dq_tile.mul_(call.scale)).to(dq.dtype)
    return dq
