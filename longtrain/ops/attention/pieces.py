"""A call as the pieces that a library can compute: which queries meet which keys, and how.

Libraries know fewer masks than this op does: all keys, causal, windows. With the *global* out and lse the gradients of disjoint
pieces add up exactly (as those of chunks do), and their outputs merge by LSE, so a call that no library takes whole is cut:

    chunk at an offset     = prefix (every key visible) + diagonal square            x x x x . .
                             (+ later queries, who see every key)                    x x x x x .
    window, documents      = for each document the smallest rectangle with every visible pair

Inside a piece masks are aligned bottom-right, as in flash-attn: with t queries and s keys, query i stands at key i + s - t and sees
[i + s - t - left, i + s - t + right]. Whatever the offsets, a rectangle's window can be written so (`_rectangle`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from longtrain.ops.attention.call import AttentionCall, Document
from longtrain.ops.attention.merge import merge_attention

FULL, CAUSAL = (-1, -1), (-1, 0)


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries `rows` against keys `cols` (indices into the call's tensors)."""

    rows: slice
    cols: slice
    window: tuple[int, int] = FULL
    """(left, right) aligned bottom-right, -1 unbounded; `CAUSAL` is (-1, 0)."""
    cu_q: tuple[int, ...] | None = None
    """Boundaries of documents inside `rows`, from 0; the window holds in each document. None: one document."""
    cu_k: tuple[int, ...] | None = None

    @property
    def queries(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def keys(self) -> int:
        return self.cols.stop - self.cols.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """What a library's kernels can do, and the two functions that call them.

        forward(call, piece, q, k, v) -> out [B, t, H, Dv], lse [B, t, H]
        backward(call, piece, dout, q, k, v, out, lse) -> dq [B, t, H, D], dk [B, s, K or H, D], dv [B, s, K or H, Dv]

    Tensors come cut to the piece, in the call's dtype.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    aligned: bool
    """Takes windows, and as many keys as you like; otherwise all pairs of a rectangle or the causal ones of a square."""
    packed: bool
    """Takes several documents in one call."""
    strip: int | None = None
    """Not `aligned`, but takes windows in strips of so many queries (it makes a mask of strip x band)."""
    key_block: int | None = None
    """Most keys of one backward call, which bounds the partial dK, dV that it returns."""


def refuse(call: AttentionCall) -> str | None:
    """What the kernels of no library do, or None."""
    if call.value_dim != call.head_dim:
        return f"value dim {call.value_dim} differs from head dim {call.head_dim}"
    if call.dropout_p > 0:
        return "no counter-based dropout"
    if call.sink_tokens or call.stride:
        return "no sink tokens or strided blocks"
    if call.has_dlse:
        return "its backward takes no gradient of the LSE"
    return None


def pieces(call: AttentionCall, library: Library, key_block: int | None = None) -> Iterator[Piece]:
    """Pieces that hold every visible pair once. Rows that see no key are in none; pieces with the same rows follow each other."""
    pack: list[Document] = []
    for doc in call.documents:
        fits = library.packed and call.packed and _can_pack(call, doc, key_block)
        if pack and not (fits and _follows(pack, doc, key_block)):
            yield _packed(call, pack)
            pack = []
        if fits:
            pack.append(doc)
        else:
            yield from _of_document(call, doc, library, key_block)
    if pack:
        yield _packed(call, pack)


def _can_pack(call: AttentionCall, doc: Document, key_block: int | None) -> bool:
    """Aligned bottom-right as it stands, and every query sees a key."""
    queries, keys = doc.q_stop - doc.q_start, doc.k_stop - doc.k_start
    aligned = doc.q_stop + doc.q_shift == doc.k_stop + call.k_offset or not (call.causal or call.windowed)
    return (
        aligned and 0 < queries and (queries <= keys or call.left_reach() is call.right_reach() is None) and 0 < keys <= (key_block or keys)
    )


def _follows(pack: list[Document], doc: Document, key_block: int | None) -> bool:
    adjacent = doc.k_start == pack[-1].k_stop and doc.q_start == pack[-1].q_stop
    return adjacent and (key_block is None or doc.k_stop - pack[0].k_start <= key_block)


def _packed(call: AttentionCall, pack: list[Document]) -> Piece:
    left, right = call.left_reach(), call.right_reach()
    first, last = pack[0], pack[-1]
    return Piece(
        slice(first.q_start, last.q_stop),
        slice(first.k_start, last.k_stop),
        (-1 if left is None else left, -1 if right is None else right),
        (0, *(d.q_stop - first.q_start for d in pack)),
        (0, *(d.k_stop - first.k_start for d in pack)),
    )


def _of_document(call: AttentionCall, doc: Document, library: Library, key_block: int | None) -> Iterator[Piece]:
    shift, left, right = doc.q_shift - call.k_offset, call.left_reach(), call.right_reach()  # query i stands at key i + shift
    whole = _rectangle(doc.q_start, doc.q_stop, doc.k_start, doc.k_stop, shift, left, right)
    if whole is None:
        return
    for start in range(whole.cols.start, whole.cols.stop, key_block or whole.keys):
        stop = min(start + (key_block or whole.keys), whole.cols.stop)
        block = _rectangle(whole.rows.start, whole.rows.stop, start, stop, shift, left, right)
        if block is None:
            continue
        if block.window[0] == -1:
            yield from _without_corner(block, library.aligned)
        elif library.aligned:
            yield block
        else:
            yield from _strips(block, library.strip)


def _rectangle(q0: int, q1: int, k0: int, k1: int, shift: int, left: int | None, right: int | None) -> Piece | None:
    """The smallest rectangle of queries [q0, q1) x keys [k0, k1) with every visible pair, every row seeing a key; None if there is none."""
    if right is not None:
        q0 = max(q0, k0 - shift - right)
    if left is not None:
        q1 = min(q1, k1 - shift + left)
    if q0 >= q1 or k0 >= k1:
        return None
    if left is not None:
        k0 = max(k0, q0 + shift - left)
    if right is not None:
        k1 = min(k1, q1 + shift + right)
    # Bottom-right, the last query stands at the last key; here it stands `ahead` of it. A side that binds nobody is unbounded.
    ahead, t, s = q1 + shift - k1, q1 - q0, k1 - k0
    left = -1 if left is None or left - ahead >= s - 1 else left - ahead
    right = -1 if right is None or right + ahead >= t - 1 else right + ahead
    return Piece(slice(q0, q1), slice(k0, k1), (left, right))


def _without_corner(piece: Piece, aligned: bool) -> Iterator[Piece]:
    """A piece with nothing hidden but an upper right corner, as rectangles and a causal square (or `aligned`: one causal rectangle)."""
    right = piece.window[1]
    if right == -1:
        yield piece
        return
    n = piece.queries - right  # the last `right` queries see every key; of the others the last one sees the last key
    edge, split = piece.rows.start + n, piece.cols.stop - n
    if aligned or split == piece.cols.start:
        yield Piece(slice(piece.rows.start, edge), piece.cols, CAUSAL)
    else:
        yield Piece(slice(piece.rows.start, edge), slice(piece.cols.start, split))
        yield Piece(slice(piece.rows.start, edge), slice(split, piece.cols.stop), CAUSAL)
    if right:
        yield Piece(slice(edge, piece.rows.stop), piece.cols)


def _strips(piece: Piece, strip: int) -> Iterator[Piece]:
    shift = piece.cols.stop - piece.rows.stop
    left, right = (None if side == -1 else side for side in piece.window)
    for start in range(piece.rows.start, piece.rows.stop, strip):
        yield _rectangle(start, min(start + strip, piece.rows.stop), piece.cols.start, piece.cols.stop, shift, left, right)


def forward(call: AttentionCall, library: Library, q, k, v, sink_logits):
    """q [B, T, H, D], k [B, S, K, D], v [B, S, K, Dv] -> out [B, T, H, Dv] in q's dtype, lse [B, T, H] wide. Merges in the wide dtype."""
    out = torch.zeros(call.batch, call.queries, call.heads, call.value_dim, dtype=q.dtype, device=q.device)
    lse = torch.full((call.batch, call.queries, call.heads), -torch.inf, dtype=call.wide, device=q.device)
    merged: Any = None
    parts = [*pieces(call, library)]
    for piece, following in zip(parts, [*parts[1:], None]):
        part = library.forward(call, piece, q[:, piece.rows], k[:, piece.cols], v[:, piece.cols])
        merged = part if merged is None else merge_attention(*merged, *part)
        if following is None or following.rows != piece.rows:  # the rows are complete: round once
            out[:, piece.rows], lse[:, piece.rows] = merged if sink_logits is None else _with_sink(call, *merged, sink_logits)
            merged = None
    if sink_logits is not None:
        lse = torch.where(lse.isneginf(), sink_logits.to(call.wide), lse)  # rows that see no key see the sink
    return out, lse


def _with_sink(call: AttentionCall, out, lse, sink_logits):
    """The sink only enlarges the denominator: out exp(lse) / (exp(lse) + exp(sink))."""
    with_sink = torch.logaddexp(lse.to(call.wide), sink_logits.to(call.wide))
    return out * torch.exp(lse - with_sink.masked_fill(with_sink == -torch.inf, 0))[..., None], with_sink


def backward(call: AttentionCall, library: Library, dout, q, k, v, out, lse, dk, dv):
    """Adds into dk [B, S, K, D] and dv [B, S, K, Dv] (wide), returns dq. Partial results are added in the wide dtype."""
    dq = torch.zeros(q.shape, dtype=call.wide, device=q.device)
    for piece in pieces(call, library, library.key_block):
        rows, cols = piece.rows, piece.cols
        dq_b, dk_b, dv_b = library.backward(call, piece, dout[:, rows], q[:, rows], k[:, cols], v[:, cols], out[:, rows], lse[:, rows])
        dq[:, rows] += dq_b
        dk[:, cols] += _of_kv_heads(call, dk_b)
        dv[:, cols] += _of_kv_heads(call, dv_b)
    return dq.to(q.dtype)


def _of_kv_heads(call: AttentionCall, x: torch.Tensor) -> torch.Tensor:
    """A gradient given for all query heads, summed over those of each kv head."""
    return x if x.shape[2] == call.kv_heads else x.to(call.wide).unflatten(2, (call.kv_heads, call.group)).sum(3)
