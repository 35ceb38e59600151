"""The public functions, and the torch custom ops under them (autograd, fake kernels, declared mutation).

Arguments that need no tensor values are checked here, so that `torch.compile` sees the checks as guards; boundaries of
documents are read and checked inside the ops, which are opaque to it.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from longtrain.ops.attention.call import (
    AttentionCall,
    build_call,
    check_options,
    check_tensors,
    split_block_stride,
    wrong,
)
from longtrain.ops.attention.select import Explanation, explain_call, select


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size=(-1, -1), q_offset=None, k_offset=0, sink_tokens=0,
    sink_logits=None, block_stride=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    softcap=None, scale=None, dropout_p=0.0, dropout_seed=None, head_offset=0, deterministic=False, return_lse=False,
    backend="auto", partials="bf16", kernel_fallback="error",
):
    """Exact softmax attention of q on k and v, differentiable in q, k, v and sink_logits.

    Args:
        q: [B, T, H, D], float64, float32, bfloat16 or float16.
        k: [B, S, K, D] and v: [B, S, K, Dv], q's dtype and device; H % K == 0, head h reads kv head h // (H // K).
        causal: keys after the query are hidden (by position, see q_offset).
        window_size: (left, right) as in flash-attn: key position in [query - left, query + right]; -1 unbounded. A
            Hugging Face window W is (W - 1, 0).
        q_offset, k_offset: positions of the first query and key; any value. q_offset None: the queries are the last of
            the keys, k_offset + S - T (in each document, when packed).
        sink_tokens: the first n positions (of each document) stay visible outside the window, inside causality.
        sink_logits: [H], one more logit per head in the softmax's denominator, without a value (gpt-oss); in the LSE.
        block_stride: (block, stride), or stride with blocks of 64: key blocks whose index, counted from position 0 (of
            each document), is a multiple of stride stay visible outside the window (LongGen; see `mask.py`).
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [documents + 1], B = 1: document i is q[cu_q[i]:cu_q[i+1]] against
            k[cu_k[i]:cu_k[i+1]]; either may be empty. One given serves both sides. They cover all tokens;
            cu_seqlens_k[0] may be negative when the first document began before the keys given (needed for its sinks
            and strided blocks). Keep them on the CPU: they are read on the host.
        max_seqlen_q, max_seqlen_k: longest document, checked, for libraries that want it.
        softcap: scores become softcap * tanh(score / softcap).
        scale: of the scores; default D ** -0.5.
        dropout_p, dropout_seed: inverted dropout of probabilities by a hash of (dropout_seed, batch index, head_offset +
            head, query position, key position), see `mask.py`; with cu_seqlens, positions in the pack (index + offset).
        head_offset: index of q's first head in the model, when heads are split over processes.
        deterministic: bitwise the same result on every run, whatever the number of threads.
        return_lse: also return the LSE.
        backend: "auto", or a name from `explain(...)`.
        partials: "bf16" lets libraries serve 16-bit calls: their partial results (of pieces, of blocks of keys) have the inputs'
            dtype and are added in float32. "fp32": only kernels whose partial results are float32.
        kernel_fallback: "error" refuses a call on a GPU that only plain torch can serve, "warn" warns and runs it there.

    Returns:
        out [B, T, H, Dv] in q's dtype; with return_lse also lse [B, T, H] (float32, float64 for float64), the natural
        log of the softmax's denominator over the scaled, capped scores. A row that sees no key: out 0, lse -inf (or its
        sink logit), gradients 0.

    Raises:
        ValueError: naming argument, found and expected; or a named backend's reason to refuse.
    """
    check_tensors(q, k, v)
    check_options(
        q, causal=causal, window_size=window_size, q_offset=q_offset, k_offset=k_offset, sink_tokens=sink_tokens,
        sink_logits=sink_logits, block_stride=block_stride, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, softcap=softcap, scale=scale, dropout_p=dropout_p,
        dropout_seed=dropout_seed, head_offset=head_offset, deterministic=deterministic,
    )
    block, stride = split_block_stride(block_stride)
    out, lse = _forward_op(
        q, k, v, sink_logits, cu_seqlens_q, cu_seqlens_k, causal, window_size[0], window_size[1], q_offset, k_offset,
        sink_tokens, block, stride, max_seqlen_q, max_seqlen_k, softcap, scale, dropout_p, dropout_seed, head_offset,
        deterministic, backend, partials, kernel_fallback,
    )
    return (out, lse) if return_lse else out


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, dk: Tensor, dv: Tensor, causal: bool,
    window_size=(-1, -1), q_offset=None, k_offset=0, sink_tokens=0, sink_logits=None, block_stride=None,
    cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softcap=None, scale=None,
    dropout_p=0.0, dropout_seed=None, head_offset=0, deterministic=False, backend="auto", partials="bf16", kernel_fallback="error",
    dsink=None, dlse=None,
) -> Tensor:
    """Gradient of `attention` on these queries and keys, given the *global* out and lse of the queries.

    With out and lse over all keys, the gradients of blocks of keys (a prefix and a diagonal, ring hops, swapped K/V)
    add up exactly: call it once a block with the same dout, out, lse.

    Args:
        dout, out: [B, T, H, Dv] in q's dtype; lse: [B, T, H] wide. The rest as in `attention`.
        dk, dv: [B, S, K, D] and [B, S, K, Dv], float32 (float64 for float64), added into; any strides (slices of a
            larger buffer), not overlapping.
        dsink: [H] wide, added into when given. It does not depend on the keys: give it for one block only.
        dlse: [B, T, H] wide, gradient of the LSE, when it was used; for every block alike.

    Returns:
        dq [B, T, H, D] in q's dtype.

    Raises:
        ValueError: as `attention`.
    """
    check_tensors(q, k, v)
    check_options(
        q, causal=causal, window_size=window_size, q_offset=q_offset, k_offset=k_offset, sink_tokens=sink_tokens,
        sink_logits=sink_logits, block_stride=block_stride, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, softcap=softcap, scale=scale, dropout_p=dropout_p,
        dropout_seed=dropout_seed, head_offset=head_offset, deterministic=deterministic,
    )
    B, T, H, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = (B, T, H)
    _check_like("dout", dout, (*rows, v.shape[3]), q.dtype, q)
    _check_like("out", out, (*rows, v.shape[3]), q.dtype, q)
    _check_like("lse", lse, rows, wide, q)
    _check_like("dk", dk, tuple(k.shape), wide, q)
    _check_like("dv", dv, tuple(v.shape), wide, q)
    if dlse is not None:
        _check_like("dlse", dlse, rows, wide, q)
    if dsink is not None:
        if sink_logits is None:
            raise wrong("dsink", "a tensor", "None, since sink_logits is None")
        _check_like("dsink", dsink, (H,), wide, q)
    block, stride = split_block_stride(block_stride)
    return _backward_op(
        dout, q, k, v, out, lse, dlse, sink_logits, dk, dv, dsink, cu_seqlens_q, cu_seqlens_k, causal, window_size[0],
        window_size[1], q_offset, k_offset, sink_tokens, block, stride, max_seqlen_q, max_seqlen_k, softcap, scale,
        dropout_p, dropout_seed, head_offset, deterministic, backend, partials, kernel_fallback,
    )


def checked_call(
    q, k, v, *, causal, window_size=(-1, -1), q_offset=None, k_offset=0, sink_tokens=0, sink_logits=None,
    block_stride=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softcap=None,
    scale=None, dropout_p=0.0, dropout_seed=None, head_offset=0, deterministic=False, return_lse=False,
    partials="bf16",
) -> AttentionCall:
    """The call `attention` would make of these arguments; raises what it raises."""
    options = dict(
        causal=causal, window_size=window_size, q_offset=q_offset, k_offset=k_offset, sink_tokens=sink_tokens,
        sink_logits=sink_logits, block_stride=block_stride, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, softcap=softcap, scale=scale, dropout_p=dropout_p,
        dropout_seed=dropout_seed, head_offset=head_offset, deterministic=deterministic,
    )
    check_tensors(q, k, v)
    check_options(q, **options)
    return build_call(q, k, v, **options, partials=partials)


def explain(q, k, v, *, causal: bool, backend: str = "auto", kernel_fallback: str = "error", **options) -> Explanation:
    """Which backend would serve `attention(q, k, v, causal=causal, **options)`, and why the others would not.

    Takes the arguments of `attention` (tensors are only looked at, `torch.empty` will do) and raises what it raises.
    """
    return explain_call(checked_call(q, k, v, causal=causal, **options), backend, kernel_fallback)


def _check_like(name: str, x, shape: tuple, dtype: torch.dtype, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise wrong(name, type(x).__name__, "a tensor")
    if tuple(x.shape) != shape:
        raise wrong(name, f"shape {tuple(x.shape)}", f"shape {shape}")
    if x.dtype != dtype:
        raise wrong(name, x.dtype, f"{dtype} for q's dtype {q.dtype}")
    if x.device != q.device:
        raise wrong(name, x.device, f"q's device {q.device}")


def _op_call(
    q, k, v, sink_logits, cu_seqlens_q, cu_seqlens_k, causal, window_left, window_right, q_offset, k_offset,
    sink_tokens, block, stride, max_seqlen_q, max_seqlen_k, softcap, scale, dropout_p, dropout_seed, head_offset,
    deterministic, has_dlse=False, partials="bf16",
) -> AttentionCall:
    return build_call(
        q, k, v, causal=causal, window_size=(window_left, window_right), q_offset=q_offset, k_offset=k_offset,
        sink_tokens=sink_tokens, sink_logits=sink_logits, block_stride=(block, stride) if stride else None,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        softcap=softcap, scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed, head_offset=head_offset,
        deterministic=deterministic, has_dlse=has_dlse, partials=partials,
    )


@torch.library.custom_op("longtrain::attention", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, sink_logits: Optional[Tensor], cu_seqlens_q: Optional[Tensor],
    cu_seqlens_k: Optional[Tensor], causal: bool, window_left: int, window_right: int, q_offset: Optional[int],
    k_offset: int, sink_tokens: int, block: int, stride: int, max_seqlen_q: Optional[int], max_seqlen_k: Optional[int],
    softcap: Optional[float], scale: Optional[float], dropout_p: float, dropout_seed: Optional[int], head_offset: int,
    deterministic: bool, backend: str, partials: str = "bf16", kernel_fallback: str = "error",
) -> tuple[Tensor, Tensor]:
    call = _op_call(
        q, k, v, sink_logits, cu_seqlens_q, cu_seqlens_k, causal, window_left, window_right, q_offset, k_offset,
        sink_tokens, block, stride, max_seqlen_q, max_seqlen_k, softcap, scale, dropout_p, dropout_seed, head_offset,
        deterministic, partials=partials,
    )
    return select(call, backend, kernel_fallback).forward(call, q, k, v, sink_logits)


@_forward_op.register_fake
def _(q, k, v, sink_logits, *options):
    B, T, H, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((B, T, H, v.shape[3])), q.new_empty((B, T, H), dtype=wide)


def _row_delta(call: AttentionCall, dout: Tensor, out: Tensor, dlse: Optional[Tensor]) -> Tensor:
    """delta_bth = dout_bth . out_bth - dlse_bth, wide, converting a bounded number of tokens at a time."""
    delta = torch.empty(call.batch, call.queries, call.heads, dtype=call.wide, device=call.device)
    for start in range(0, call.queries, 1024):
        rows = slice(start, start + 1024)
        torch.sum(dout[:, rows].to(call.wide) * out[:, rows], dim=-1, out=delta[:, rows])
    return delta if dlse is None else delta.sub_(dlse)


@torch.library.custom_op("longtrain::attention_backward", mutates_args=("dk", "dv", "dsink"))
def _backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Optional[Tensor],
    sink_logits: Optional[Tensor], dk: Tensor, dv: Tensor, dsink: Optional[Tensor], cu_seqlens_q: Optional[Tensor],
    cu_seqlens_k: Optional[Tensor], causal: bool, window_left: int, window_right: int, q_offset: Optional[int],
    k_offset: int, sink_tokens: int, block: int, stride: int, max_seqlen_q: Optional[int], max_seqlen_k: Optional[int],
    softcap: Optional[float], scale: Optional[float], dropout_p: float, dropout_seed: Optional[int], head_offset: int,
    deterministic: bool, backend: str, partials: str = "bf16", kernel_fallback: str = "error",
) -> Tensor:
    call = _op_call(
        q, k, v, sink_logits, cu_seqlens_q, cu_seqlens_k, causal, window_left, window_right, q_offset, k_offset,
        sink_tokens, block, stride, max_seqlen_q, max_seqlen_k, softcap, scale, dropout_p, dropout_seed, head_offset,
        deterministic, has_dlse=dlse is not None, partials=partials,
    )
    chosen = select(call, backend, kernel_fallback)
    delta = getattr(chosen, "row_delta", _row_delta)(call, dout, out, dlse)
    if dsink is not None:
        # dsink_h = -sum_bt exp(sink_h - lse_bth) delta_bth: the sink's probability times (0 - delta).
        weight = torch.exp(sink_logits.to(call.wide) - lse)
        dsink -= (weight * delta).sum((0, 1))
    return chosen.backward(call, dout, q, k, v, out, lse, delta, dk, dv)


@_backward_op.register_fake
def _(dout, q, *rest):
    return q.new_empty(q.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, sink_logits, cu_seqlens_q, cu_seqlens_k, *options = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, sink_logits, cu_seqlens_q, cu_seqlens_k)
    ctx.options = options
    ctx.set_materialize_grads(False)  # an unused LSE has no gradient, not one of zeros


def _autograd_backward(ctx, dout, dlse):
    q, k, v, out, lse, sink_logits, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    dk = torch.zeros(k.shape, dtype=lse.dtype, device=k.device)
    dv = torch.zeros(v.shape, dtype=lse.dtype, device=v.device)
    dsink = None
    if sink_logits is not None and ctx.needs_input_grad[3]:
        dsink = torch.zeros(sink_logits.shape, dtype=lse.dtype, device=q.device)
    if dout is None:
        dout = torch.zeros_like(out)
    dq = _backward_op(
        dout, q, k, v, out, lse, dlse, sink_logits, dk, dv, dsink, cu_seqlens_q, cu_seqlens_k, *ctx.options
    )
    dsink = None if dsink is None else dsink.to(sink_logits.dtype)
    return (dq, dk.to(k.dtype), dv.to(v.dtype), dsink, *[None] * (2 + len(ctx.options)))


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)
