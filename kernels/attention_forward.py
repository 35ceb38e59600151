"""Forward: one program is one tile of queries of one head, tiles of keys streamed past it with an online softmax in base 2
(FlashAttention-2, arXiv 2307.08691, algorithm 1). Tiles that every row sees come first, without a mask; then those that
the mask cuts; then special keys (attention_tiles.py).

Scores x are the raw products (or, with a softcap, the capped scores); probabilities are 2^(rate x - ...), rate > 0: the
sign of the scale goes into the queries.
"""

import triton
import triton.language as tl

from longtrain.kernels.attention_tiles import (
    LN2,
    LOG2E,
    VARYING,
    count_specials,
    find_document,
    head_of,
    kept,
    load_rows,
    load_tile,
    met_tiles,
    near,
    row_keys,
    special_keys,
    tanh,
    without_nonfinite,
)


@triton.jit
def _forward_tile(
    acc, m, l, q_tile, k_tile, v_tile, j, seen, hash_a, hash_b, rate, cap, dropout, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):
    """acc, the rows' maxima m of x and sums l, with the keys j more; with MASK only where `seen` [queries, keys]."""
    if MASK:
        v_tile, bad = without_nonfinite(v_tile)
    x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    if SOFTCAP:
        x = tanh(x * cap[0]) * cap[1]
    if MASK:
        x = tl.where(seen, x, -float("inf"))
    m_new = tl.maximum(m, tl.max(x, 1))
    base = m_new * rate
    if MASK:
        base = tl.where(m_new == -float("inf"), 0.0, base)  # a row that has seen nothing: 2^(-inf - 0) is 0, not NaN
    p = tl.exp2(x * rate - base[:, None])
    shrink = tl.exp2(m * rate - base)
    l = l * shrink + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept(dropout, hash_a[:, None], hash_b[:, None], j[None, :]), p, 0.0)
    if MASK:
        p = tl.where(seen & bad[None, :], float("nan"), p)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
    return acc, m_new, l


@triton.jit(do_not_specialize=VARYING)
def attention_forward(
    q, k, v, out, lse, sink_logits, k_box, v_box, q_strides, k_strides, v_strides, documents, documents_count, queries,
    keys, low, high, diagonal, sink_start, sink_stop, phase, q_shift, rate, cap, seed_low, seed_high, head_offset,
    k_offset, threshold, upscale, GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PACKED: tl.constexpr,
    SIGN: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SINK_LOGITS: tl.constexpr, SPECIALS: tl.constexpr,
    BLOCK: tl.constexpr, PERIOD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_MASKED: tl.constexpr,
):
    """q [B, T, H, D], k [B, S, K, D], v [B, S, K, Dv] by strides; out [B, T, H, Dv], lse [B, T, H] contiguous.

    Grid: (tiles of queries, H, B). k_box, v_box: tensor descriptors of k and v as [B, K, S, D], or None. documents: table
    of `DOCUMENT` rows (int32), read when PACKED; else keys ... q_shift say it. cap: (scale / softcap, softcap). seed_low ...
    threshold: 32-bit words. upscale: 1 / (1 - dropout_p).
    """
    tile, head, batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)  # longest first
    whole = (0, queries, 0, keys, low, high, diagonal, sink_start, sink_stop, phase, q_shift)
    document, tile = find_document(documents, whole, tile, documents_count, 0, BLOCK_Q, PACKED)
    q_start, q_stop, k_start, k_stop, low, high, diagonal = document[:7]
    dropout = (seed_low, seed_high, head_offset, k_offset, threshold)
    first = q_start + tile * BLOCK_Q
    if first >= q_stop:
        return
    last = tl.minimum(first + BLOCK_Q, q_stop) - 1
    rows, cols = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    i = first + rows
    kv_head = head // GROUP
    k, v = head_of(k, batch, kv_head, k_strides), head_of(v, batch, kv_head, v_strides)
    q_tile = load_tile(
        None, head_of(q, batch, head, q_strides), batch, head, first, rows, q_strides[1], q_strides[3], i < q_stop, DIM, BLOCK_DIM
    )
    if SIGN != 1:
        q_tile = (q_tile * SIGN).to(q_tile.dtype)
    hash_a, hash_b = i, i
    if DROPOUT:
        hash_a, hash_b = row_keys(dropout, batch, head, i + document[10])
    acc = tl.zeros((BLOCK_Q, BLOCK_VALUE), tl.float32)
    m = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_Q,), tl.float32)

    a, b, c, d = met_tiles(first, last, k_start, k_stop, low, high, BLOCK_K)
    for n in tl.range(b, c):
        start = k_start + n * BLOCK_K
        k_tile = load_tile(k_box, k, batch, kv_head, start, cols, k_strides[1], k_strides[3], None, DIM, BLOCK_DIM)
        v_tile = load_tile(v_box, v, batch, kv_head, start, cols, v_strides[1], v_strides[3], None, VALUE_DIM, BLOCK_VALUE)
        acc, m, l = _forward_tile(
            acc, m, l, q_tile, k_tile, v_tile, start + cols, None, hash_a, hash_b, rate, cap, dropout, False, SOFTCAP, DROPOUT,
            PRECISION,
        )
    # Smaller tiles where there is a mask: it takes registers.
    cols = tl.arange(0, BLOCK_MASKED)
    b, c = b * (BLOCK_K // BLOCK_MASKED), c * (BLOCK_K // BLOCK_MASKED)
    a, _, _, d = met_tiles(first, last, k_start, k_stop, low, high, BLOCK_MASKED)
    for n in tl.range(a, d - (c - b)):
        start = k_start + tl.where(n < b, n, n + c - b) * BLOCK_MASKED
        j = start + cols
        k_tile = load_tile(None, k, batch, kv_head, start, cols, k_strides[1], k_strides[3], j < k_stop, DIM, BLOCK_DIM)
        v_tile = load_tile(None, v, batch, kv_head, start, cols, v_strides[1], v_strides[3], j < k_stop, VALUE_DIM, BLOCK_VALUE)
        seen = near(i[:, None], j[None, :], low, high) & (j < k_stop)[None, :]
        acc, m, l = _forward_tile(
            acc, m, l, q_tile, k_tile, v_tile, j, seen, hash_a, hash_b, rate, cap, dropout, True, SOFTCAP, DROPOUT, PRECISION
        )
    if SPECIALS:
        # Those before the window of the last row; all up to the diagonal where keys after the window are hidden.
        stop = last + 1 + tl.where(high == diagonal, low, diagonal)
        sinks, total = count_specials(document, stop, BLOCK, PERIOD)
        for n in tl.range(0, tl.cdiv(total, BLOCK_MASKED)):
            j, counts = special_keys(document, n * BLOCK_MASKED + cols, sinks, total, BLOCK, PERIOD)
            k_tile = load_rows(k, j.to(tl.int64), k_strides[1], k_strides[3], counts, DIM, BLOCK_DIM)
            v_tile = load_rows(v, j.to(tl.int64), v_strides[1], v_strides[3], counts, VALUE_DIM, BLOCK_VALUE)
            seen = ~near(i[:, None], j[None, :], low, high) & (j[None, :] <= i[:, None] + diagonal) & counts[None, :]
            acc, m, l = _forward_tile(
                acc, m, l, q_tile, k_tile, v_tile, j, seen, hash_a, hash_b, rate, cap, dropout, True, SOFTCAP, DROPOUT,
                PRECISION,
            )

    top = tl.where(m == -float("inf"), m, m * rate)
    if SINK_LOGITS:  # the sink only enlarges the denominator
        sink = tl.load(sink_logits + head).to(tl.float32) * LOG2E
        with_sink = tl.maximum(top, sink)
        with_sink = tl.where(with_sink == -float("inf"), 0.0, with_sink)
        shrink = tl.exp2(top - with_sink)
        l = l * shrink + tl.exp2(sink - with_sink)
        acc, top = acc * shrink[:, None], with_sink
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    acc = acc * tl.where(empty, 0.0, upscale / l)[:, None]
    row = (batch.to(tl.int64) * queries + first) * tl.num_programs(1) + head
    present = i < q_stop
    tl.store(
        lse + row + rows * tl.num_programs(1), tl.where(empty, -float("inf"), (top + tl.log2(l)) * LN2), mask=present
    )
    dims = tl.arange(0, BLOCK_VALUE)
    at = out + row * VALUE_DIM + rows[:, None] * (tl.num_programs(1) * VALUE_DIM) + dims[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=present[:, None] & (dims[None, :] < VALUE_DIM))
