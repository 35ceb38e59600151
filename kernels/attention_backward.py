"""Backward from the global out and lse (FlashAttention-2, arXiv 2307.08691, algorithm 2), in passes in which every sum has
one owner, so that every run gives the same bits:

    delta      delta_i = dout_i . out_i - dlse_i
    dk, dv     one program is one tile of keys of one kv head; past it go the tiles of queries of all heads of its group.
               Sums in registers, added once to the caller's dk, dv. Special keys (attention_tiles.py): a second launch.
    dq         one program is one tile of queries of one head; past it go the tiles of keys, as in the forward.

    p_ij = 2^(rate x_ij - lse_i log2 e)     ds_ij = p_ij (dp_ij - delta_i), times 1 - tanh^2 under a softcap
"""

import triton
import triton.language as tl

from longtrain.kernels.attention_tiles import (
    LOG2E,
    VARYING,
    count_specials,
    find_document,
    head_of,
    kept,
    load_document,
    load_rows,
    load_tile,
    met_tiles,
    near,
    row_keys,
    special_keys,
    tanh,
    without_nonfinite,
)


@triton.jit(do_not_specialize=["queries"])
def attention_delta(
    dout, out, dlse, delta, queries, dout_strides, out_strides, dlse_strides, VALUE_DIM: tl.constexpr,
    DLSE: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_Q: tl.constexpr,
):
    """delta [B, H, T] contiguous, from dout, out [B, T, H, Dv] and dlse [B, T, H]. Grid: (tiles of queries, H, B)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_Q
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, BLOCK_Q)
    present = first + rows < queries
    dout += batch * dout_strides[0] + first * dout_strides[1] + head * dout_strides[2]
    out += batch * out_strides[0] + first * out_strides[1] + head * out_strides[2]
    dout_tile = load_rows(dout, rows, dout_strides[1], dout_strides[3], present, VALUE_DIM, BLOCK_VALUE).to(tl.float32)
    out_tile = load_rows(out, rows, out_strides[1], out_strides[3], present, VALUE_DIM, BLOCK_VALUE).to(tl.float32)
    total = tl.sum(dout_tile * out_tile, 1)
    if DLSE:
        dlse += batch * dlse_strides[0] + head * dlse_strides[2]
        total -= tl.load(dlse + (first + rows) * dlse_strides[1], mask=present, other=0.0)
    tl.store(delta + (batch * tl.num_programs(1) + head) * queries + first + rows, total, mask=present)


@triton.jit
def _key_tile(
    dk, dv, k_tile, v_tile, q_tile, dout_tile, lse_row, delta_row, batch, head, i, j, seen, q_shift, rate, cap, dropout,
    upscale, MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):
    """dk [keys, D] (without the scale) and dv [keys, Dv] with the queries i more, in transposed tiles [keys, queries]; with
    MASK only where `seen`."""
    q_clean, dout_clean = q_tile, dout_tile
    if MASK:
        q_clean, q_bad = without_nonfinite(q_tile)
        dout_clean, dout_bad = without_nonfinite(dout_tile)
    if SOFTCAP:
        capped = tanh(tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * cap[0])
        p = tl.exp2(capped * (cap[1] * rate) - (lse_row * LOG2E)[None, :])
    else:
        # lse and, below, delta begin the sums: as rows of their own they would take registers that are not there.
        x = tl.broadcast_to((lse_row * -LOG2E / rate)[None, :], k_tile.shape[0], q_tile.shape[0])
        p = tl.exp2(tl.dot(k_tile, tl.trans(q_tile), x, input_precision=PRECISION) * rate)
    if MASK:
        p = tl.where(seen, p, 0.0)
    weight = p
    if DROPOUT:
        hash_a, hash_b = row_keys(dropout, batch, head, i + q_shift)
        factor = tl.where(kept(dropout, hash_a[None, :], hash_b[None, :], j[:, None]), upscale, 0.0)
        weight = p * factor
        dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision=PRECISION)
        ds = p * (dp * factor - delta_row[None, :])
    else:
        dp = tl.dot(v_tile, tl.trans(dout_tile), tl.broadcast_to(-delta_row[None, :], p.shape), input_precision=PRECISION)
        ds = p * dp
    if SOFTCAP:
        ds = ds * (1.0 - capped * capped)
    if MASK:
        ds = tl.where(seen, ds, 0.0)
        weight = tl.where(seen & dout_bad[None, :], float("nan"), weight)
        ds = tl.where(seen & q_bad[None, :], float("nan"), ds)
    dv = tl.dot(weight.to(dout_tile.dtype), dout_clean, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(q_tile.dtype), q_clean, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=VARYING)
def attention_dk_dv(
    q, k, v, dout, lse, delta, dk, dv, q_box, dout_box, q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides,
    documents, documents_count, queries, keys, low, high, diagonal, sink_start, sink_stop, phase, q_shift, rate, cap,
    seed_low, seed_high, head_offset, k_offset, threshold, upscale, scale, GROUP: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, PACKED: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SPECIALS: tl.constexpr,
    BLOCK: tl.constexpr, PERIOD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_MASKED: tl.constexpr,
):
    """Adds into dk [B, S, K, D] and dv [B, S, K, Dv] (float32). lse, delta [B, H, T] contiguous; the rest as in the forward.

    Grid: (tiles of keys, K, B); with SPECIALS (tiles of special keys of the longest document, K, B or documents).
    """
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cols, rows = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Q)
    dropout = (seed_low, seed_high, head_offset, k_offset, threshold)
    document = (0, queries, 0, keys, low, high, diagonal, sink_start, sink_stop, phase, q_shift)
    if SPECIALS:
        if PACKED:
            document = load_document(documents, batch)
            batch = batch * 0
        sinks, total = count_specials(document, document[3], BLOCK, PERIOD)
        j, present = special_keys(document, tile * BLOCK_K + cols, sinks, total, BLOCK, PERIOD)
        beyond = tile * BLOCK_K >= total
    else:
        document, tile = find_document(documents, document, tile, documents_count, 2, BLOCK_K, PACKED)
        j = document[2] + tile * BLOCK_K + cols
        present = j < document[3]
        beyond = document[2] + tile * BLOCK_K >= document[3]
    if beyond:
        return
    q_start, q_stop, k_start, k_stop, low, high, diagonal = document[:7]
    q_shift = document[10]
    j_wide = j.to(tl.int64)
    k_tile = load_rows(head_of(k, batch, kv_head, k_strides), j_wide, k_strides[1], k_strides[3], present, DIM, BLOCK_DIM)
    v_tile = load_rows(head_of(v, batch, kv_head, v_strides), j_wide, v_strides[1], v_strides[3], present, VALUE_DIM, BLOCK_VALUE)
    dk_tile = tl.zeros((BLOCK_K, BLOCK_DIM), tl.float32)
    dv_tile = tl.zeros((BLOCK_K, BLOCK_VALUE), tl.float32)

    if SPECIALS:
        # Queries past the first key's window; all from the diagonal on where keys after the window are hidden.
        first = tl.min(tl.where(present, j, k_stop)) - tl.where(high == diagonal, low - 1, diagonal)
        a = tl.maximum(0, first - q_start) // BLOCK_MASKED
        b, c, d = a, a, tl.maximum(a, tl.cdiv(q_stop - q_start, BLOCK_MASKED))
    else:
        first = k_start + tile * BLOCK_K
        last = tl.minimum(first + BLOCK_K, k_stop) - 1
        a, b, c, d = met_tiles(first, last, q_start, q_stop, -high, -low, BLOCK_Q)
        for n in tl.range(0, GROUP * (c - b)):
            head, start = kv_head * GROUP + n // (c - b), q_start + (b + n % (c - b)) * BLOCK_Q
            q_tile = load_tile(
                q_box, head_of(q, batch, head, q_strides), batch, head, start, rows, q_strides[1], q_strides[3], None, DIM,
                BLOCK_DIM,
            )
            dout_tile = load_tile(
                dout_box, head_of(dout, batch, head, dout_strides), batch, head, start, rows, dout_strides[1], dout_strides[3],
                None, VALUE_DIM, BLOCK_VALUE,
            )
            at = (batch.to(tl.int64) * tl.num_programs(1) * GROUP + head) * queries + start
            dk_tile, dv_tile = _key_tile(
                dk_tile, dv_tile, k_tile, v_tile, q_tile, dout_tile, tl.load(lse + at + rows), tl.load(delta + at + rows),
                batch, head, start + rows, j, None, q_shift, rate, cap, dropout, upscale, False, SOFTCAP, DROPOUT, PRECISION,
            )
        b, c = b * (BLOCK_Q // BLOCK_MASKED), c * (BLOCK_Q // BLOCK_MASKED)
        a, _, _, d = met_tiles(first, last, q_start, q_stop, -high, -low, BLOCK_MASKED)
    # Smaller tiles where there is a mask: it takes registers.
    rows = tl.arange(0, BLOCK_MASKED)
    masked = d - a - (c - b)
    for n in tl.range(0, GROUP * masked):
        head, tile = kv_head * GROUP + n // masked, a + n % masked
        start = q_start + tl.where(tile < b, tile, tile + c - b) * BLOCK_MASKED
        i = start + rows
        valid = i < q_stop
        q_tile = load_tile(
            None, head_of(q, batch, head, q_strides), batch, head, start, rows, q_strides[1], q_strides[3], valid, DIM, BLOCK_DIM
        )
        dout_tile = load_tile(
            None, head_of(dout, batch, head, dout_strides), batch, head, start, rows, dout_strides[1], dout_strides[3], valid,
            VALUE_DIM, BLOCK_VALUE,
        )
        seen = near(i[None, :], j[:, None], low, high)
        if SPECIALS:
            seen = ~seen & (j[:, None] <= i[None, :] + diagonal)
        seen = seen & present[:, None] & valid[None, :]
        at = (batch.to(tl.int64) * tl.num_programs(1) * GROUP + head) * queries + start
        dk_tile, dv_tile = _key_tile(
            dk_tile, dv_tile, k_tile, v_tile, q_tile, dout_tile, tl.load(lse + at + rows, mask=valid, other=0.0),
            tl.load(delta + at + rows, mask=valid, other=0.0), batch, head, i, j, seen, q_shift, rate, cap, dropout, upscale,
            True, SOFTCAP, DROPOUT, PRECISION,
        )

    _add_rows(head_of(dk, batch, kv_head, dk_strides), dk_tile * scale, j_wide, dk_strides, present, DIM, BLOCK_DIM)
    _add_rows(head_of(dv, batch, kv_head, dv_strides), dv_tile, j_wide, dv_strides, present, VALUE_DIM, BLOCK_VALUE)


@triton.jit
def _add_rows(base, tile, rows, strides, present, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    dims = tl.arange(0, BLOCK_DIM)
    at = base + rows[:, None] * strides[1] + dims[None, :] * strides[3]
    mask = present[:, None] & (dims[None, :] < DIM)
    # Nobody else adds here: a reduction, only because it keeps the old values out of the registers.
    tl.atomic_add(at, tile, mask=mask, sem="relaxed")


@triton.jit
def _query_tile(
    dq, q_tile, dout_tile, lse_row, delta_row, k_tile, v_tile, j, seen, hash_a, hash_b, rate, cap, dropout, upscale,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):
    """dq [queries, D] (without the scale) with the keys j more; with MASK only where `seen` [queries, keys]."""
    k_clean = k_tile
    if MASK:
        k_clean, bad = without_nonfinite(k_tile)
    x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    if SOFTCAP:
        capped = tanh(x * cap[0])
        x = capped * cap[1]
    p = tl.exp2(x * rate - (lse_row * LOG2E)[:, None])
    dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
    if DROPOUT:
        dp = tl.where(kept(dropout, hash_a[:, None], hash_b[:, None], j[None, :]), dp * upscale, 0.0)
    ds = p * (dp - delta_row[:, None])
    if SOFTCAP:
        ds = ds * (1.0 - capped * capped)
    if MASK:
        ds = tl.where(seen, tl.where(bad[None, :], float("nan"), ds), 0.0)
    return tl.dot(ds.to(k_tile.dtype), k_clean, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=VARYING)
def attention_dq(
    q, k, v, dout, lse, delta, dq, k_box, v_box, q_strides, k_strides, v_strides, dout_strides, documents, documents_count,
    queries, keys, low, high, diagonal, sink_start, sink_stop, phase, q_shift, rate, cap, seed_low, seed_high,
    head_offset, k_offset, threshold, upscale, scale, GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PACKED: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SPECIALS: tl.constexpr, BLOCK: tl.constexpr,
    PERIOD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_MASKED: tl.constexpr,
):
    """dq [B, T, H, D] contiguous. lse, delta [B, H, T] contiguous; the rest, and the grid, as in the forward."""
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
    present = i < q_stop
    kv_head = head // GROUP
    k, v = head_of(k, batch, kv_head, k_strides), head_of(v, batch, kv_head, v_strides)
    q_tile = load_tile(
        None, head_of(q, batch, head, q_strides), batch, head, first, rows, q_strides[1], q_strides[3], present, DIM, BLOCK_DIM
    )
    dout_tile = load_tile(
        None, head_of(dout, batch, head, dout_strides), batch, head, first, rows, dout_strides[1], dout_strides[3], present,
        VALUE_DIM, BLOCK_VALUE,
    )
    at = (batch.to(tl.int64) * tl.num_programs(1) + head) * queries + first
    lse_row = tl.load(lse + at + rows, mask=present, other=0.0)
    delta_row = tl.load(delta + at + rows, mask=present, other=0.0)
    hash_a, hash_b = i, i
    if DROPOUT:
        hash_a, hash_b = row_keys(dropout, batch, head, i + document[10])
    dq_tile = tl.zeros((BLOCK_Q, BLOCK_DIM), tl.float32)

    a, b, c, d = met_tiles(first, last, k_start, k_stop, low, high, BLOCK_K)
    for n in tl.range(b, c):
        start = k_start + n * BLOCK_K
        k_tile = load_tile(k_box, k, batch, kv_head, start, cols, k_strides[1], k_strides[3], None, DIM, BLOCK_DIM)
        v_tile = load_tile(v_box, v, batch, kv_head, start, cols, v_strides[1], v_strides[3], None, VALUE_DIM, BLOCK_VALUE)
        dq_tile = _query_tile(
            dq_tile, q_tile, dout_tile, lse_row, delta_row, k_tile, v_tile, start + cols, None, hash_a, hash_b, rate, cap,
            dropout, upscale, False, SOFTCAP, DROPOUT, PRECISION,
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
        dq_tile = _query_tile(
            dq_tile, q_tile, dout_tile, lse_row, delta_row, k_tile, v_tile, j, seen, hash_a, hash_b, rate, cap, dropout,
            upscale, True, SOFTCAP, DROPOUT, PRECISION,
        )
    if SPECIALS:
        stop = last + 1 + tl.where(high == diagonal, low, diagonal)
        sinks, total = count_specials(document, stop, BLOCK, PERIOD)
        for n in tl.range(0, tl.cdiv(total, BLOCK_MASKED)):
            j, counts = special_keys(document, n * BLOCK_MASKED + cols, sinks, total, BLOCK, PERIOD)
            k_tile = load_rows(k, j.to(tl.int64), k_strides[1], k_strides[3], counts, DIM, BLOCK_DIM)
            v_tile = load_rows(v, j.to(tl.int64), v_strides[1], v_strides[3], counts, VALUE_DIM, BLOCK_VALUE)
            seen = ~near(i[:, None], j[None, :], low, high) & (j[None, :] <= i[:, None] + diagonal) & counts[None, :]
            dq_tile = _query_tile(
                dq_tile, q_tile, dout_tile, lse_row, delta_row, k_tile, v_tile, j, seen, hash_a, hash_b, rate, cap, dropout,
                upscale, True, SOFTCAP, DROPOUT, PRECISION,
            )

    row = (batch.to(tl.int64) * queries + first) * tl.num_programs(1) + head
    dims = tl.arange(0, BLOCK_DIM)
    at = dq + row * DIM + rows[:, None] * (tl.num_programs(1) * DIM) + dims[None, :]
    tl.store(at, (dq_tile * scale).to(dq.dtype.element_ty), mask=present[:, None] & (dims[None, :] < DIM))
