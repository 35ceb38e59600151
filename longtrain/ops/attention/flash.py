"""PyTorch's flash kernel on CUDA, called below `scaled_dot_product_attention`.

`aten::_flash_attention_forward` (what `torch.nn.attention.varlen` calls) takes [B, T, H, D] or packed [T, H, D] with
cumulative lengths, GQA, windows and causality aligned bottom-right, and returns the LSE; `_backward` takes out and lse.
Bottom-right is our default alignment, so a chunk of queries against its prefix is one call. The backward of one causal
document is prefix blocks of `KEY_BLOCK` keys and a diagonal, added in the wide dtype: the kernel returns dK/dV in bf16
and, with GQA, for all query heads, which would be large and rounded for a whole prefix.
"""

from __future__ import annotations

import torch

from longtrain.ops.attention.call import AttentionCall, Document

KEY_BLOCK = 16384

_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward


def refuse(call: AttentionCall) -> str | None:
    """Why the call cannot be served exactly, or None."""
    if call.device.type != "cuda":
        return f"torch's CUDA flash kernel: the tensors are on {call.device.type}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without its flash kernel"
    if torch.cuda.get_device_capability(call.device) < (8, 0):
        return "the GPU is older than sm_80"
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"bfloat16 and float16 only, not {call.dtype}"
    if call.value_dim != call.head_dim:
        return f"value dim {call.value_dim} differs from head dim {call.head_dim}"
    if call.head_dim % 8 or call.head_dim > 256:
        return f"head dim {call.head_dim} is not a multiple of 8 up to 256"
    if call.softcap is not None:
        return "no softcap"
    if call.scale <= 0:
        return "positive scales only"
    if call.dropout_p > 0:
        return "no counter-based dropout"
    if call.sink_tokens or call.stride:
        return "no sink tokens or strided blocks"
    if call.has_dlse:
        return "its backward takes no gradient of the LSE"
    if call.deterministic:
        return "its backward adds dQ in no fixed order"
    if call.queries == 0 or call.keys == 0:
        return "no empty queries or keys"
    if (call.causal or call.windowed) and not all(_bottom_right(call, doc) for doc in call.documents):
        return "the queries are not the last ones of their keys"
    return None


def _bottom_right(call: AttentionCall, doc: Document) -> bool:
    return doc.q_stop + doc.q_shift == doc.k_stop + call.k_offset


def _window(call: AttentionCall) -> dict:
    left, right = call.left_reach(), call.right_reach()
    return {
        "scale": call.scale,
        "window_size_left": -1 if left is None else left,
        "window_size_right": -1 if right is None else right,
    }


def _packing(call: AttentionCall):
    """(cu_q, cu_k, max_q, max_k) on the device; no boundaries for an unpacked call."""
    if not call.packed:
        return None, None, call.queries, call.keys
    docs = call.documents
    cu_q = [docs[0].q_start, *(d.q_stop for d in docs)]
    cu_k = [docs[0].k_start, *(d.k_stop for d in docs)]
    longest_q, longest_k = max(d.q_stop - d.q_start for d in docs), max(d.k_stop - d.k_start for d in docs)
    to_device = dict(dtype=torch.int32, device=call.device)
    return torch.tensor(cu_q, **to_device), torch.tensor(cu_k, **to_device), longest_q, longest_k


def _for_kernel(call: AttentionCall, x_BTHD: torch.Tensor) -> torch.Tensor:
    """Packed calls drop the batch axis; the kernel wants the last axis contiguous."""
    x = x_BTHD[0] if call.packed else x_BTHD
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(call: AttentionCall, q, k, v, sink_logits):
    """q [B, T, H, D], k, v [B, S, K, D] -> out [B, T, H, D] in q's dtype, lse [B, T, H] float32."""
    cu_q, cu_k, max_q, max_k = _packing(call)
    out, lse, *_ = _flash(
        *(_for_kernel(call, x) for x in (q, k, v)), cu_q, cu_k, max_q, max_k, 0.0, call.causal, False, **_window(call)
    )
    out, lse = (out[None], lse[None]) if call.packed else (out, lse)
    lse = lse.transpose(1, 2)
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)  # the kernel's mark of a row that saw no key
    if sink_logits is not None:
        # The sink only enlarges the denominator: out exp(lse) / (exp(lse) + exp(sink)).
        with_sink = torch.logaddexp(lse, sink_logits.to(call.wide))
        shrink = torch.exp(lse - with_sink.masked_fill(with_sink == -torch.inf, 0))
        out, lse = (out * shrink[..., None]).to(q.dtype), with_sink
    return out, lse.contiguous()


def backward(call: AttentionCall, dout, q, k, v, out, lse, delta, dk, dv):
    """Adds into dk, dv [B, S, K, D] (float32), returns dq."""
    cu_q, cu_k, max_q, max_k = _packing(call)
    lse_kernel = lse.masked_fill(lse == -torch.inf, torch.inf).transpose(1, 2).contiguous()
    lse_kernel = lse_kernel[0] if call.packed else lse_kernel
    q_, dout_, out_ = (_for_kernel(call, x) for x in (q, dout, out))
    blocks = list(_key_blocks(call))
    rng_state = torch.zeros(2, dtype=torch.uint64, device=call.device)
    unused = torch.empty(0, device=call.device)
    dq = None
    for cols, causal in blocks:
        k_, v_ = _for_kernel(call, k[:, cols]), _for_kernel(call, v[:, cols])
        dq_b, dk_b, dv_b = _flash_backward(
            dout_, q_, k_, v_, out_, lse_kernel, cu_q, cu_k, max_q, max_k if call.packed else cols.stop - cols.start,
            0.0, causal, rng_state, unused, **_window(call) if len(blocks) == 1 else {"scale": call.scale},
        )
        dq = dq_b if len(blocks) == 1 else dq_b.float() if dq is None else dq.add_(dq_b)
        dk[:, cols] += dk_b.view_as(dk[:, cols])
        dv[:, cols] += dv_b.view_as(dv[:, cols])
    return dq.to(q.dtype).view_as(q)


def _key_blocks(call: AttentionCall):
    """(keys, causal) that cover the call once: the prefix in blocks, then the diagonal; or all keys in one."""
    if call.packed or call.windowed or call.queries > call.keys or call.keys <= KEY_BLOCK:
        yield slice(0, call.keys), call.causal
        return
    prefix = call.keys - call.queries if call.causal else call.keys
    for start in range(0, prefix, KEY_BLOCK):
        yield slice(start, min(start + KEY_BLOCK, prefix)), False
    if call.causal:
        yield slice(prefix, call.keys), True
