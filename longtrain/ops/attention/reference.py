"""Attention in plain torch, quadratic in memory, every option: the oracle the other backends are compared with.

    s_ij = scale * q_i . k_j          c = softcap * tanh(s / softcap)
    lse_i = log(sum_j exp(c_ij) + exp(sink_i))      over visible j
    p_ij = exp(c_ij - lse_i)          out_i = sum_j m_ij p_ij v_j          m the dropout mask over (1 - p)

Backward (FlashAttention-2, arXiv 2307.08691, section 3.1.2, with the capped score's derivative), from the global out
and lse, so that any block of keys or queries can be differentiated alone:

    delta_i = dout_i . out_i - dlse_i               dp_ij = m_ij dout_i . v_j
    dc_ij = p_ij (dp_ij - delta_i)                  ds_ij = dc_ij (1 - (c_ij / softcap)^2)
    dq_i = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i    dv_j = sum_i m_ij p_ij dout_i
"""

from __future__ import annotations

import torch

from longtrain.ops.attention.call import AttentionCall, Document
from longtrain.ops.attention.mask import dropout_keep, masked_matmul, visible


def refuse(call: AttentionCall) -> str | None:
    """Serves everything; never chosen by itself (its memory is quadratic)."""
    return None


def _heads_first(x_BTKD: torch.Tensor, group: int, wide: torch.dtype) -> torch.Tensor:
    return x_BTKD.to(wide).transpose(1, 2).repeat_interleave(group, dim=1)


def _scores(call: AttentionCall, doc: Document, q_BHTD, k_BHSD):
    """Capped scores with -inf where masked, the mask [T, S], and the dropout factor [B, H, T, S] or None."""
    device = q_BHTD.device
    q_pos = torch.arange(doc.q_start, doc.q_stop, device=device) + doc.q_shift
    k_pos = torch.arange(doc.k_start, doc.k_stop, device=device) + call.k_offset
    allowed = visible(call, doc, q_pos, k_pos)
    c = call.scale * (q_BHTD @ k_BHSD.transpose(2, 3))
    if call.softcap is not None:
        c = call.softcap * torch.tanh(c / call.softcap)
    c = c.masked_fill(~allowed, -torch.inf)
    factor = None
    if call.dropout_p > 0:
        batch, head = torch.arange(call.batch, device=device), torch.arange(call.heads, device=device)
        factor = dropout_keep(call, batch, head, q_pos, k_pos).to(c.dtype) / (1 - call.dropout_p)
    return c, allowed, factor


def forward(call: AttentionCall, q, k, v, sink_logits):
    """q [B, T, H, D], k [B, S, K, D], v [B, S, K, Dv] -> out [B, T, H, Dv] in q's dtype, lse [B, T, H] wide."""
    out = torch.zeros(call.batch, call.queries, call.heads, call.value_dim, dtype=q.dtype, device=q.device)
    lse = torch.full((call.batch, call.queries, call.heads), -torch.inf, dtype=call.wide, device=q.device)
    for doc in call.documents:
        rows, cols = slice(doc.q_start, doc.q_stop), slice(doc.k_start, doc.k_stop)
        q_BHTD = _heads_first(q[:, rows], 1, call.wide)
        k_BHSD = _heads_first(k[:, cols], call.group, call.wide)
        v_BHSD = _heads_first(v[:, cols], call.group, call.wide)
        c, allowed, factor = _scores(call, doc, q_BHTD, k_BHSD)
        denominator = c if sink_logits is None else torch.cat([c, _sink_column(sink_logits, c)], dim=-1)
        lse_BHT = torch.logsumexp(denominator, dim=-1)
        p = torch.exp(c - lse_BHT[..., None]).masked_fill(~allowed, 0)
        out_BHTV = masked_matmul(p if factor is None else p * factor, v_BHSD, allowed)
        out[:, rows] = out_BHTV.transpose(1, 2).to(out.dtype)
        lse[:, rows] = lse_BHT.transpose(1, 2)
    return out, lse


def _sink_column(sink_logits_H: torch.Tensor, c_BHTS: torch.Tensor) -> torch.Tensor:
    B, H, T, _ = c_BHTS.shape
    return sink_logits_H.to(c_BHTS.dtype)[None, :, None, None].expand(B, H, T, 1)


def backward(call: AttentionCall, dout, q, k, v, out, lse, delta, dk, dv):
    """Adds into dk [B, S, K, D] and dv [B, S, K, Dv] (wide), returns dq. delta [B, T, H] as in the module's formula."""
    dq = torch.zeros_like(q)
    for doc in call.documents:
        rows, cols = slice(doc.q_start, doc.q_stop), slice(doc.k_start, doc.k_stop)
        q_BHTD = _heads_first(q[:, rows], 1, call.wide)
        do_BHTV = _heads_first(dout[:, rows], 1, call.wide)
        k_BHSD = _heads_first(k[:, cols], call.group, call.wide)
        v_BHSD = _heads_first(v[:, cols], call.group, call.wide)
        c, allowed, factor = _scores(call, doc, q_BHTD, k_BHSD)
        p = torch.exp(c - lse[:, rows].transpose(1, 2)[..., None]).masked_fill(~allowed, 0)
        dp = do_BHTV @ v_BHSD.transpose(2, 3)
        dropped = p
        if factor is not None:
            dp, dropped = dp * factor, p * factor
        ds = p * (dp - delta[:, rows].transpose(1, 2)[..., None])
        if call.softcap is not None:
            ds = ds * (1 - (c / call.softcap).square())
        ds = ds.masked_fill(~allowed, 0)
        dq_BHTD = call.scale * masked_matmul(ds, k_BHSD, allowed)
        dk_BHSD = call.scale * masked_matmul(ds.transpose(2, 3), q_BHTD, allowed.T)
        dv_BHSV = masked_matmul(dropped.transpose(2, 3), do_BHTV, allowed.T)
        dq[:, rows] = dq_BHTD.transpose(1, 2).to(dq.dtype)
        dk[:, cols] += dk_BHSD.unflatten(1, (call.kv_heads, call.group)).sum(2).transpose(1, 2)
        dv[:, cols] += dv_BHSV.unflatten(1, (call.kv_heads, call.group)).sum(2).transpose(1, 2)
    return dq
