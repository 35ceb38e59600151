"""What one attention call is: shapes, options and documents, checked once, then handed to a backend.

Axes: B batch, T queries, S keys, H query heads, K kv heads (head h reads kv head h // (H // K)), D head dim,
V value dim (`Dv`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEFAULT_BLOCK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """Queries `[q_start, q_stop)` see only keys `[k_start, k_stop)` (indices into this call's tensors)."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    q_shift: int
    """Position of query i is `i + q_shift`."""
    origin: int
    """Position of the document's first key: sink tokens and strided blocks are counted from here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """A validated call. Position of key j is `j + k_offset`; of query i, `i + document.q_shift`."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    causal: bool
    window: tuple[int, int]
    """(left, right), -1 unbounded. Causality is separate and always applies."""
    k_offset: int
    documents: tuple[Document, ...]
    packed: bool
    sink_tokens: int
    has_sink_logits: bool
    block: int
    stride: int
    """Strided blocks: 0 is off."""
    softcap: float | None
    scale: float
    dropout_p: float
    dropout_seed: int
    head_offset: int
    deterministic: bool
    has_dlse: bool = False
    """Backward only: a gradient of the LSE flows in."""
    partials: str = "bf16"
    """`fp32`: no backend that returns partial results in a 16-bit dtype."""

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def wide(self) -> torch.dtype:
        """Accumulators and LSE: float32, float64 for float64."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def windowed(self) -> bool:
        return self.window != (-1, -1)

    def left_reach(self) -> int | None:
        """How far back a query sees through the window; None is unbounded."""
        return None if self.window[0] < 0 else self.window[0]

    def right_reach(self) -> int | None:
        """How far ahead a query sees through the window and causality; None is unbounded."""
        right = None if self.window[1] < 0 else self.window[1]
        if self.causal:
            return 0 if right is None else min(right, 0)
        return right


def wrong(argument: str, found, expected: str) -> ValueError:
    return ValueError(f"attention: {argument}: found {found}, expected {expected}")


def _integer(name: str, value, low: int | None = None, high: int | None = None, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, (bool, float)) or not isinstance(value, (int, torch.SymInt)):
        raise wrong(name, repr(value), "an integer" + (" or None" if optional else ""))
    if low is not None and value < low:
        raise wrong(name, value, f"an integer >= {low}")
    if high is not None and value > high:
        raise wrong(name, value, f"an integer <= {high}")


def _real(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise wrong(name, repr(value), "a number")
    if isinstance(value, (int, float)) and not math.isfinite(value):
        raise wrong(name, value, "a finite number")


def check_tensors(q, k, v) -> None:
    """Shapes, dtypes and devices of q `[B, T, H, D]`, k `[B, S, K, D]`, v `[B, S, K, Dv]`; ValueError if they disagree."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise wrong(name, type(x).__name__, "a tensor")
        if x.dim() != 4:
            raise wrong(name, f"shape {tuple(x.shape)}", "4 axes [batch, tokens, heads, head dim]")
        if x.dtype not in DTYPES:
            raise wrong(name, x.dtype, "float64, float32, bfloat16 or float16")
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise wrong(name, x.dtype, f"q's dtype {q.dtype}")
        if x.device != q.device:
            raise wrong(name, x.device, f"q's device {q.device}")
        if x.shape[0] != B:
            raise wrong(name, f"batch {x.shape[0]}", f"q's batch {B}")
    if k.shape[3] != D:
        raise wrong("k", f"head dim {k.shape[3]}", f"q's head dim {D}")
    if D == 0:
        raise wrong("q", "head dim 0", "a positive head dim")
    if v.shape[1] != S or v.shape[2] != K:
        raise wrong("v", f"shape {tuple(v.shape)}", f"k's tokens and heads ({B}, {S}, {K}, Dv)")
    if K == 0 or H % K != 0:
        raise wrong("k", f"{K} kv heads", f"a divisor of q's {H} heads")


def check_options(
    q, *, causal, window_size, q_offset, k_offset, sink_tokens, sink_logits, block_stride, cu_seqlens_q,
    cu_seqlens_k, max_seqlen_q, max_seqlen_k, softcap, scale, dropout_p, dropout_seed, head_offset, deterministic,
) -> None:
    """Everything that can be told without reading tensor values; ValueError naming argument, found and expected."""
    for name, flag in (("causal", causal), ("deterministic", deterministic)):
        if not isinstance(flag, bool):
            raise wrong(name, repr(flag), "True or False")
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise wrong("window_size", repr(window_size), "a pair (left, right), -1 for unbounded")
    for side, value in zip(("left", "right"), window_size):
        _integer(f"window_size ({side})", value, low=-1)
    _integer("q_offset", q_offset, optional=True)
    _integer("k_offset", k_offset)
    _integer("sink_tokens", sink_tokens, low=0)
    _integer("head_offset", head_offset, low=0)
    _integer("max_seqlen_q", max_seqlen_q, low=0, optional=True)
    _integer("max_seqlen_k", max_seqlen_k, low=0, optional=True)
    split_block_stride(block_stride)
    if sink_logits is not None:
        if not isinstance(sink_logits, torch.Tensor) or tuple(sink_logits.shape) != (q.shape[2],):
            found = f"shape {tuple(sink_logits.shape)}" if isinstance(sink_logits, torch.Tensor) else repr(sink_logits)
            raise wrong("sink_logits", found, f"a tensor with one logit per query head ({q.shape[2]},)")
        if sink_logits.dtype not in DTYPES:
            raise wrong("sink_logits", sink_logits.dtype, "a floating dtype")
        if sink_logits.device != q.device:
            raise wrong("sink_logits", sink_logits.device, f"q's device {q.device}")
    if softcap is not None:
        _real("softcap", softcap)
        if softcap <= 0:
            raise wrong("softcap", softcap, "a positive number or None")
    if scale is not None:
        _real("scale", scale)
    _real("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise wrong("dropout_p", dropout_p, "a probability in [0, 1)")
    if dropout_p > 0 and dropout_seed is None:
        raise wrong("dropout_seed", None, "an integer, since dropout_p > 0 (the mask is a function of the seed)")
    _integer("dropout_seed", dropout_seed, low=-(2**63), high=2**63 - 1, optional=True)
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu is None:
            continue
        if not isinstance(cu, torch.Tensor) or cu.dim() != 1 or cu.dtype not in (torch.int32, torch.int64):
            found = f"{cu.dtype} of shape {tuple(cu.shape)}" if isinstance(cu, torch.Tensor) else repr(cu)
            raise wrong(name, found, "an int32 or int64 tensor [documents + 1]")
        if cu.shape[0] < 1:
            raise wrong(name, "an empty tensor", "documents + 1 entries")
        if q.shape[0] != 1:
            raise wrong("q", f"batch {q.shape[0]}", "batch 1 with cu_seqlens (documents are packed along the token axis)")
    if cu_seqlens_q is not None and cu_seqlens_k is not None and cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise wrong("cu_seqlens_k", f"{cu_seqlens_k.shape[0]} entries", f"cu_seqlens_q's {cu_seqlens_q.shape[0]}")


def split_block_stride(block_stride) -> tuple[int, int]:
    """`None` -> (64, 0); `stride` -> (64, stride); `(block, stride)` as it is."""
    if block_stride is None:
        return DEFAULT_BLOCK, 0
    pair = tuple(block_stride) if isinstance(block_stride, (tuple, list)) else (DEFAULT_BLOCK, block_stride)
    if len(pair) != 2:
        raise wrong("block_stride", repr(block_stride), "None, a stride in blocks of 64, or a pair (block, stride)")
    _integer("block_stride (block)", pair[0], low=1)
    _integer("block_stride (stride)", pair[1], low=1)
    return pair


def _boundaries(name: str, cu: torch.Tensor, tokens: int, first_may_be_negative: bool) -> list[int]:
    bounds = cu.tolist()
    if bounds[0] > 0 or (bounds[0] < 0 and not first_may_be_negative):
        raise wrong(name, f"first entry {bounds[0]}", "0" + (" or less" if first_may_be_negative else ""))
    for i in range(1, len(bounds)):
        if bounds[i] < bounds[i - 1]:
            raise wrong(name, f"{bounds[i]} after {bounds[i - 1]} at entry {i}", "entries that never decrease")
    if bounds[-1] != tokens:
        raise wrong(name, f"last entry {bounds[-1]}", f"the number of tokens, {tokens}")
    return bounds


def _documents(queries, keys, q_offset, k_offset, cu_q, cu_k, max_q, max_k) -> tuple[Document, ...]:
    if cu_q is None and cu_k is None:
        q_shift = k_offset + keys - queries if q_offset is None else q_offset
        whole = Document(q_start=0, q_stop=queries, k_start=0, k_stop=keys, q_shift=q_shift, origin=0)
        lengths = [(queries, keys)]
        documents = [whole]
    else:
        # One side given: the same boundaries for both, so an error names the argument that was given.
        name_q = "cu_seqlens_q" if cu_q is not None else "cu_seqlens_k"
        name_k = "cu_seqlens_k" if cu_k is not None else "cu_seqlens_q"
        bounds_q = _boundaries(name_q, cu_q if cu_q is not None else cu_k, queries, False)
        bounds_k = _boundaries(name_k, cu_k if cu_k is not None else cu_q, keys, True)
        documents, lengths = [], []
        for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:]):
            q_shift = k_offset + k1 - q1 if q_offset is None else q_offset
            start = min(max(k0, 0), max(k1, 0))
            document = Document(
                q_start=q0, q_stop=q1, k_start=start, k_stop=max(k1, 0), q_shift=q_shift, origin=k_offset + k0
            )
            documents.append(document)
            lengths.append((q1 - q0, k1 - k0))
    for name, limit, side in (("max_seqlen_q", max_q, 0), ("max_seqlen_k", max_k, 1)):
        longest = max((pair[side] for pair in lengths), default=0)
        if limit is not None and limit < longest:
            raise wrong(name, limit, f"at least the longest document, {longest}")
    return tuple(documents)


def build_call(
    q, k, v, *, causal, window_size, q_offset, k_offset, sink_tokens, sink_logits, block_stride, cu_seqlens_q,
    cu_seqlens_k, max_seqlen_q, max_seqlen_k, softcap, scale, dropout_p, dropout_seed, head_offset, deterministic,
    has_dlse=False, partials="bf16",
) -> AttentionCall:
    """The call as data. Reads `cu_seqlens` (a device synchronisation if they are on a GPU: keep them on the CPU).

    Raises:
        ValueError: naming argument, found and expected, for boundaries that decrease or do not cover the tokens.
    """
    B, T, H, D = q.shape
    block, stride = split_block_stride(block_stride)
    documents = _documents(
        T, k.shape[1], q_offset, k_offset, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    )
    return AttentionCall(
        batch=B, queries=T, keys=k.shape[1], heads=H, kv_heads=k.shape[2], head_dim=D, value_dim=v.shape[3],
        dtype=q.dtype, device=q.device, causal=causal, window=tuple(window_size), k_offset=k_offset,
        documents=documents, packed=cu_seqlens_q is not None or cu_seqlens_k is not None, sink_tokens=sink_tokens,
        has_sink_logits=sink_logits is not None, block=block, stride=stride, softcap=softcap,
        scale=D**-0.5 if scale is None else scale, dropout_p=dropout_p,
        dropout_seed=0 if dropout_seed is None else dropout_seed, head_offset=head_offset,
        deterministic=deterministic, has_dlse=has_dlse, partials=partials,
    )
