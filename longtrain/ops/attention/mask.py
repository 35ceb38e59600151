"""Who sees whom, and which probabilities are dropped: functions of global positions only.

Both are written in positions, never in tile or tensor indices, so that a chunk, a ring hop or a swapped block sees
exactly what the whole call would show it.

Visible (query position p, key position s, document origin o; W the window, n sink tokens, blocks of b, stride r):

    base    = same document and (not causal or s <= p)
    near    = p - left <= s <= p + right          (a side of -1 is unbounded)
    sink    = 0 <= s - o < n                       (StreamingLLM, arXiv 2309.17453: the first tokens stay visible)
    strided = floor((s - o) / b) mod r == 0        (LongGen, arXiv 2410.01485, section 3: blockwise strided context)
    visible = base and (near or sink or strided)

LongGen keeps "token blocks at a fixed stride plus the local context" and drops the others from the KV cache. Dropping
works only when a key is kept or dropped for all later queries alike, so the stride counts blocks from the document's
origin (block 0, which holds the attention sinks, is always kept), not backwards from the query; `window_size` is the
local part. With an unbounded window, sinks and strided blocks add nothing.

Dropout: an integer hash of (seed, batch, head, query position, key position). `mix32` is "lowbias32" (C. Wellons,
hash-prospector, public domain: a bijection of 32 bits with avalanche bias 0.17); it needs two 32-bit multiplications,
cheap in AVX2, AVX-512, Triton and, by wrapping int64, in torch. Two chains over the words (seed low, seed high, batch,
head, query) give a 64-bit row key; a key position costs one more affine step and one mix:

    chain(c):  h = 0;  for w in words: h = mix32(h + w + c)          (all mod 2^32)
    a = chain(0x9E3779B9) | 1               b = chain(0x85EBCA6B)
    u(s) = mix32(a * s + b)                 kept  <=>  u(s) >= round(p * 2^32)

Positions enter modulo 2^32. Kept probabilities are divided by 1 - p; the LSE is without dropout.
"""

from __future__ import annotations

import torch

from longtrain.ops.attention.call import AttentionCall, Document

_M32 = 0xFFFFFFFF
CHAIN_A = 0x9E3779B9
CHAIN_B = 0x85EBCA6B


def visible(call: AttentionCall, doc: Document, q_pos_T: torch.Tensor, k_pos_S: torch.Tensor) -> torch.Tensor:
    """Boolean [T, S] by the rule above, for positions (int64) inside one document."""
    p, s = q_pos_T[:, None], k_pos_S[None, :]
    left, right = call.window
    near = torch.ones(p.shape[0], s.shape[1], dtype=torch.bool, device=p.device)
    if left >= 0:
        near &= s >= p - left
    if right >= 0:
        near &= s <= p + right
    if call.sink_tokens:
        near |= (s >= doc.origin) & (s - doc.origin < call.sink_tokens)
    if call.stride:
        near |= torch.div(s - doc.origin, call.block, rounding_mode="floor") % call.stride == 0
    return near & (s <= p) if call.causal else near


def tile_visibility(call: AttentionCall, doc: Document, p0: int, p1: int, s0: int, s1: int) -> str:
    """"none", "all" or "some" of the tile of query positions [p0, p1) and key positions [s0, s1) is visible.

    "some" may be said of a tile where a closer look finds none or all; "none" and "all" are certain.
    """
    left, right = call.window
    if call.causal and s0 > p1 - 1:
        return "none"
    below = not call.causal or s1 - 1 <= p0
    if below and (left < 0 or s0 >= p1 - 1 - left) and (right < 0 or s1 - 1 <= p0 + right):
        return "all"
    near = (left < 0 or s1 - 1 >= p0 - left) and (right < 0 or s0 <= p1 - 1 + right)
    sink = call.sink_tokens > 0 and s0 - doc.origin < call.sink_tokens and s1 - 1 >= doc.origin
    strided = False
    if call.stride:
        first, last = (s0 - doc.origin) // call.block, (s1 - 1 - doc.origin) // call.block
        strided = -(-first // call.stride) * call.stride <= last
    return "some" if near or sink or strided else "none"


def mix32(x: torch.Tensor) -> torch.Tensor:
    """lowbias32 on int64 tensors that hold values in [0, 2^32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _M32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _M32
    return x ^ (x >> 16)


def row_keys(call: AttentionCall, batch_B, head_H, q_pos_T) -> tuple[torch.Tensor, torch.Tensor]:
    """The hash's two row keys (a, b), int64 [B, H, T], for batch indices, heads without offset and query positions."""
    seed = call.dropout_seed
    words = (
        seed & _M32,
        (seed >> 32) & _M32,
        batch_B[:, None, None],
        (head_H + call.head_offset)[None, :, None],
        q_pos_T[None, None, :] & _M32,
    )
    keys = []
    for start in (CHAIN_A, CHAIN_B):
        h = torch.zeros((1, 1, 1), dtype=torch.int64, device=q_pos_T.device)
        for word in words:
            h = mix32((h + word + start) & _M32)
        keys.append(h)
    return keys[0] | 1, keys[1]


def dropout_threshold(p: float) -> int:
    return min(round(p * 2**32), _M32)


def dropout_keep(call: AttentionCall, batch_B, head_H, q_pos_T, k_pos_S) -> torch.Tensor:
    """Boolean [B, H, T, S]: which probabilities survive."""
    a, b = row_keys(call, batch_B, head_H, q_pos_T)
    # A 32-bit times a 32-bit number wraps in int64; its low 32 bits are right all the same.
    u = mix32((a[..., None] * (k_pos_S & _M32) + b[..., None]) & _M32)
    return u >= dropout_threshold(call.dropout_p)


def masked_matmul(weights: torch.Tensor, values: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """weights @ values where `allowed` is False contributes nothing, not even 0 * NaN.

    weights [..., m, n], zero where not allowed; values [..., n, d]; allowed broadcastable to weights, or None for all.
    A non-finite value reaches, as NaN, exactly the rows allowed to see it.
    """
    product = weights @ values
    if allowed is None:
        return product
    bad = ~torch.isfinite(values)
    if not bad.any():
        return product
    product = weights @ values.masked_fill(bad, 0)
    return product.masked_fill((allowed.to(weights.dtype) @ bad.to(weights.dtype)) > 0, float("nan"))
