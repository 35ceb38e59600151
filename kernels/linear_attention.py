"""Linear attention by chunks of C tokens, the formulas of longtrain/ops/linear_attention/chunked.py, in float32 tiles.

    system     delta rule: X = (I + diag(beta) M)^-1, and X diag(beta) times V and times K decayed from the entry
    states     chunk after chunk: the state at each one's entry, and U of the delta rule
    out        every chunk by itself
    d_values   P^T dout, every chunk by itself
    d_states   last chunk first: the adjoint of the state at each one's exit, and dU
    grads      every chunk by itself: everything else

Tensors are [B, T, H, ...] of any strides, a run of tokens of the sequence; states [B, H, chunks, D, V] and X [B, H, T, C] are contiguous.
"""

import triton
import triton.language as tl

from longtrain.kernels.linear_attention_decay import (
    decay_through,
    load_decay,
    scores,
    scores_vjp,
    sums_behind,
    sums_to,
    to_tokens,
)


@triton.jit
def _at(base, strides, batch, head):
    """A head's first token. (Nothing here returns None: Triton 3.6 has no such functions.)"""
    return base + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[2]


@triton.jit
def _load(base, strides, rows, valid, first, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[C, BLOCK] of the features from `first` on, float32."""
    dims = first + tl.arange(0, BLOCK)
    at = base + rows.to(tl.int64)[:, None] * strides[1] + dims[None, :] * strides[3]
    return tl.load(at, mask=valid[:, None] & (dims < DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(base, strides, rows, valid, first, tile, DIM: tl.constexpr, BLOCK: tl.constexpr):
    dims = first + tl.arange(0, BLOCK)
    at = base + rows.to(tl.int64)[:, None] * strides[1] + dims[None, :] * strides[3]
    tl.store(at, tile.to(base.dtype.element_ty), mask=valid[:, None] & (dims < DIM)[None, :])


@triton.jit
def _state_at(index, first, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr):
    """(offsets, mask) of a tile [D, V] of contiguous states."""
    dims, values = tl.arange(0, BLOCK_DIM)[:, None], first + tl.arange(0, BLOCK_VALUE)[None, :]
    return index.to(tl.int64) * DIM * VALUE_DIM + dims * VALUE_DIM + values, (dims < DIM) & (values < VALUE_DIM)


@triton.jit
def _chunk(chunk, tokens, CHUNK: tl.constexpr):
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    return rows, rows < tokens


@triton.jit
def _inverse(system, CHUNK: tl.constexpr, LEVELS: tl.constexpr):
    """(I + system)^-1 of a strictly lower triangular system: of two diagonal blocks' inverses and what lies between them, again and
    again."""
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    x = tl.where(i == j, 1.0, 0.0)
    for level in tl.range(0, LEVELS, num_stages=1):
        corner = tl.where((i >> (level + 1) == j >> (level + 1)) & (i >> level != j >> level), system, 0.0)
        x -= tl.dot(x, tl.dot(corner, x, input_precision="tf32x3"), input_precision="tf32x3")
    return x


@triton.jit(do_not_specialize=["tokens"])
def linear_system(
    k, v, g, beta, x, w, u, k_strides, v_strides, g_strides, beta_strides, w_strides, u_strides, tokens, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):
    """x, w [.., D], u [.., V]. Grid: (chunks, H, B)."""
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, valid = _chunk(chunk, tokens, CHUNK)
    if FEATURES != 0:
        g = _at(g, g_strides, batch, head)
    k_tile = _load(_at(k, k_strides, batch, head), k_strides, rows, valid, 0, DIM, BLOCK_DIM)
    g_tile = load_decay(g, g_strides, rows, valid, DIM, BLOCK_DIM, FEATURES)
    b = tl.load(_at(beta, beta_strides, batch, head) + rows * beta_strides[1], mask=valid, other=0.0).to(tl.float32)
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    met = scores(k_tile, k_tile, g_tile, CHUNK, LEVELS, FEATURES, PRECISION)
    inverse = _inverse(tl.where(i > j, b[:, None] * met, 0.0), CHUNK, LEVELS)
    at = (batch * tl.num_programs(1) + head).to(tl.int64) * tokens + rows
    tl.store(x + at[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :], inverse, mask=valid[:, None])
    k_to = b[:, None] * to_tokens(k_tile, sums_to(g_tile, FEATURES), FEATURES)
    w_tile = tl.dot(inverse, k_to, input_precision=PRECISION)
    _store(_at(w, w_strides, batch, head), w_strides, rows, valid, 0, w_tile, DIM, BLOCK_DIM)
    for first in tl.range(0, VALUE_DIM, BLOCK_VALUE):
        v_tile = b[:, None] * _load(_at(v, v_strides, batch, head), v_strides, rows, valid, first, VALUE_DIM, BLOCK_VALUE)
        u_tile = tl.dot(inverse, v_tile, input_precision=PRECISION)
        _store(_at(u, u_strides, batch, head), u_strides, rows, valid, first, u_tile, VALUE_DIM, BLOCK_VALUE)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def linear_states(
    k, u, w, g, state, states, k_strides, u_strides, w_strides, g_strides, tokens, chunks, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, CHUNK: tl.constexpr, FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):
    """states: those at the chunks' entries. state [B, H, D, V] and, with w, u go from what the first chunk finds to what is behind the
    last.

    Grid: (tiles of V, H, B).
    """
    first, head, batch = tl.program_id(0) * BLOCK_VALUE, tl.program_id(1), tl.program_id(2)
    index = batch * tl.num_programs(1) + head
    k, u = _at(k, k_strides, batch, head), _at(u, u_strides, batch, head)
    if w is not None:
        w = _at(w, w_strides, batch, head)
    if FEATURES != 0:
        g = _at(g, g_strides, batch, head)
    own, inside = _state_at(index, first, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE)
    s = tl.load(state + own, mask=inside, other=0.0)
    for chunk in tl.range(0, chunks):
        at, inside = _state_at(index * chunks + chunk, first, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE)
        tl.store(states + at, s, mask=inside)
        rows, valid = _chunk(chunk, tokens, CHUNK)
        k_tile = _load(k, k_strides, rows, valid, 0, DIM, BLOCK_DIM)
        k_tile = to_tokens(k_tile, sums_behind(g, g_strides, chunk * CHUNK, tokens, DIM, BLOCK_DIM, CHUNK, FEATURES), FEATURES)
        u_tile = _load(u, u_strides, rows, valid, first, VALUE_DIM, BLOCK_VALUE)
        if w is not None:
            u_tile -= tl.dot(_load(w, w_strides, rows, valid, 0, DIM, BLOCK_DIM), s, input_precision=PRECISION)
            _store(u, u_strides, rows, valid, first, u_tile, VALUE_DIM, BLOCK_VALUE)
        s = decay_through(s, load_decay(g, g_strides, rows, valid, DIM, BLOCK_DIM, FEATURES), FEATURES)
        s = tl.dot(tl.trans(k_tile), u_tile, s, input_precision=PRECISION)
    tl.store(state + own, s, mask=inside)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def linear_out(
    q, k, u, g, states, out, q_strides, k_strides, u_strides, g_strides, out_strides, tokens, chunks, scale, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    FEATURES: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):
    """out = (Q A) S + P U; TRANSPOSED: out = P^T U. Grid: (chunks * tiles of V, H, B)."""
    tiles: tl.constexpr = (VALUE_DIM + BLOCK_VALUE - 1) // BLOCK_VALUE
    chunk, first, head, batch = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_VALUE, tl.program_id(1), tl.program_id(2)
    rows, valid = _chunk(chunk, tokens, CHUNK)
    if FEATURES != 0:
        g = _at(g, g_strides, batch, head)
    q_tile = scale * _load(_at(q, q_strides, batch, head), q_strides, rows, valid, 0, DIM, BLOCK_DIM)
    k_tile = _load(_at(k, k_strides, batch, head), k_strides, rows, valid, 0, DIM, BLOCK_DIM)
    g_tile = load_decay(g, g_strides, rows, valid, DIM, BLOCK_DIM, FEATURES)
    u_tile = _load(_at(u, u_strides, batch, head), u_strides, rows, valid, first, VALUE_DIM, BLOCK_VALUE)
    p = scores(q_tile, k_tile, g_tile, CHUNK, LEVELS, FEATURES, PRECISION)
    if TRANSPOSED:
        o = tl.dot(tl.trans(p), u_tile, input_precision=PRECISION)
    else:
        o = tl.dot(p, u_tile, input_precision=PRECISION)
        at, inside = _state_at((batch * tl.num_programs(1) + head) * chunks + chunk, first, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE)
        q_to = to_tokens(q_tile, sums_to(g_tile, FEATURES), FEATURES)
        o = tl.dot(q_to, tl.load(states + at, mask=inside, other=0.0), o, input_precision=PRECISION)
    _store(_at(out, out_strides, batch, head), out_strides, rows, valid, first, o, VALUE_DIM, BLOCK_VALUE)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def linear_d_states(
    q, k, w, g, dout, du, dstate, dexits, q_strides, k_strides, w_strides, g_strides, dout_strides, du_strides, tokens, chunks, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, CHUNK: tl.constexpr,
    FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):
    """dexits: adjoints of the states at the chunks' exits. du goes from P^T dout to dU, dstate [B, H, D, V] from the last exit's to the
    first entry's. Grid: (tiles of V, H, B)."""
    first, head, batch = tl.program_id(0) * BLOCK_VALUE, tl.program_id(1), tl.program_id(2)
    index = batch * tl.num_programs(1) + head
    q, k = _at(q, q_strides, batch, head), _at(k, k_strides, batch, head)
    if w is not None:
        w = _at(w, w_strides, batch, head)
    if FEATURES != 0:
        g = _at(g, g_strides, batch, head)
    dout, du = _at(dout, dout_strides, batch, head), _at(du, du_strides, batch, head)
    own, inside = _state_at(index, first, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE)
    ds = tl.load(dstate + own, mask=inside, other=0.0)
    for turn in tl.range(0, chunks):
        chunk = chunks - 1 - turn
        at, inside = _state_at(index * chunks + chunk, first, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE)
        tl.store(dexits + at, ds, mask=inside)
        rows, valid = _chunk(chunk, tokens, CHUNK)
        g_tile = load_decay(g, g_strides, rows, valid, DIM, BLOCK_DIM, FEATURES)
        k_tile = _load(k, k_strides, rows, valid, 0, DIM, BLOCK_DIM)
        k_tile = to_tokens(k_tile, sums_behind(g, g_strides, chunk * CHUNK, tokens, DIM, BLOCK_DIM, CHUNK, FEATURES), FEATURES)
        du_tile = _load(du, du_strides, rows, valid, first, VALUE_DIM, BLOCK_VALUE)
        du_tile = tl.dot(k_tile, ds, du_tile, input_precision=PRECISION)
        _store(du, du_strides, rows, valid, first, du_tile, VALUE_DIM, BLOCK_VALUE)
        q_tile = scale * _load(q, q_strides, rows, valid, 0, DIM, BLOCK_DIM)
        q_tile = to_tokens(q_tile, sums_to(g_tile, FEATURES), FEATURES)
        ds = decay_through(ds, g_tile, FEATURES)
        ds = tl.dot(tl.trans(q_tile), _load(dout, dout_strides, rows, valid, first, VALUE_DIM, BLOCK_VALUE), ds, input_precision=PRECISION)
        if w is not None:
            ds -= tl.dot(tl.trans(_load(w, w_strides, rows, valid, 0, DIM, BLOCK_DIM)), du_tile, input_precision=PRECISION)
    tl.store(dstate + own, ds, mask=inside)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def linear_grads(
    q, k, v, u, x, g, beta, dout, du, states, dexits, dq, dk, dv, dg, dbeta, q_strides, k_strides, v_strides, u_strides, g_strides,
    beta_strides, dout_strides, du_strides, dq_strides, dk_strides, dv_strides, dg_strides, dbeta_strides, tokens, chunks, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, CHUNK: tl.constexpr,
    LEVELS: tl.constexpr, FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):
    """dq, dk, dv, and dg, dbeta unless None. Grid: (chunks, H, B)."""
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    index = batch * tl.num_programs(1) + head
    rows, valid = _chunk(chunk, tokens, CHUNK)
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    if FEATURES != 0:
        g = _at(g, g_strides, batch, head)
    g_tile = load_decay(g, g_strides, rows, valid, DIM, BLOCK_DIM, FEATURES)
    q_tile = scale * _load(_at(q, q_strides, batch, head), q_strides, rows, valid, 0, DIM, BLOCK_DIM)
    k_tile = _load(_at(k, k_strides, batch, head), k_strides, rows, valid, 0, DIM, BLOCK_DIM)
    sums = sums_to(g_tile, FEATURES)
    # Transposed, so that warps lie along D: along C there is too little for them, and each would hold all columns.
    dq_to = tl.zeros((BLOCK_DIM, CHUNK), tl.float32)
    dk_to = tl.zeros((BLOCK_DIM, CHUNK), tl.float32)
    dk_behind = tl.zeros((BLOCK_DIM, CHUNK), tl.float32)
    dp = tl.zeros((CHUNK, CHUNK), tl.float32)
    dm = tl.zeros((CHUNK, CHUNK), tl.float32)
    dthrough = tl.zeros((BLOCK_DIM,), tl.float32)
    db = tl.zeros((CHUNK,), tl.float32)
    if beta is not None:
        b = tl.load(_at(beta, beta_strides, batch, head) + rows * beta_strides[1], mask=valid, other=0.0).to(tl.float32)
        own = (index.to(tl.int64) * tokens + rows)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        inverse = tl.load(x + own, mask=valid[:, None], other=0.0)
    for first in tl.range(0, VALUE_DIM, BLOCK_VALUE):
        at, inside = _state_at(index * chunks + chunk, first, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE)
        s, de = tl.load(states + at, mask=inside, other=0.0), tl.load(dexits + at, mask=inside, other=0.0)
        u_tile = _load(_at(u, u_strides, batch, head), u_strides, rows, valid, first, VALUE_DIM, BLOCK_VALUE)
        dout_tile = _load(_at(dout, dout_strides, batch, head), dout_strides, rows, valid, first, VALUE_DIM, BLOCK_VALUE)
        dv_tile = _load(_at(du, du_strides, batch, head), du_strides, rows, valid, first, VALUE_DIM, BLOCK_VALUE)
        dq_to = tl.dot(s, tl.trans(dout_tile), dq_to, input_precision=PRECISION)
        dp = tl.dot(dout_tile, tl.trans(u_tile), dp, input_precision=PRECISION)
        dk_behind = tl.dot(de, tl.trans(u_tile), dk_behind, input_precision=PRECISION)
        dthrough += tl.sum(s * de, 1)
        if beta is not None:
            dx = tl.dot(tl.trans(inverse), dv_tile, input_precision=PRECISION)
            db += tl.sum(dx * _load(_at(v, v_strides, batch, head), v_strides, rows, valid, first, VALUE_DIM, BLOCK_VALUE), 1)
            dv_tile = b[:, None] * dx
            dk_to = tl.dot(s, tl.trans(dx), dk_to, input_precision=PRECISION)
            dm = tl.dot(dx, tl.trans(u_tile), dm, input_precision=PRECISION)
        _store(_at(dv, dv_strides, batch, head), dv_strides, rows, valid, first, dv_tile, VALUE_DIM, BLOCK_VALUE)
    dq_to, dk_to, dk_behind = tl.trans(dq_to), tl.trans(dk_to), tl.trans(dk_behind)
    if beta is not None:
        # dbeta: sums of rows of dX times V - (K A) S - M U, of which dX S^T and dX U^T are there
        k_to = to_tokens(k_tile, sums, FEATURES)
        met = tl.where(i > j, scores(k_tile, k_tile, g_tile, CHUNK, LEVELS, FEATURES, PRECISION), 0.0)
        db -= tl.sum(dk_to * k_to, 1) + tl.sum(dm * met, 1)
        _store_row(_at(dbeta, dbeta_strides, batch, head), dbeta_strides, rows, valid, db)
        dk_to, dm = -b[:, None] * dk_to, tl.where(i > j, -b[:, None] * dm, 0.0)
    behind = sums_behind(g, g_strides, chunk * CHUNK, tokens, DIM, BLOCK_DIM, CHUNK, FEATURES)
    dk_tile = to_tokens(dk_behind, behind, FEATURES)
    if FEATURES == 0:
        dg_tile = 0.0
    else:
        # dg_m: everything that is decayed from the entry past m, through the chunk, and from before m to the end
        past, ahead = dq_to * to_tokens(q_tile, sums, FEATURES), dk_behind * to_tokens(k_tile, behind, FEATURES)
        if beta is not None:
            past += dk_to * k_to
        if FEATURES == 1:
            past, ahead = tl.sum(past, 1), tl.sum(ahead, 1)
            dg_tile = tl.sum(dthrough, 0) * tl.exp(tl.sum(g_tile, 0)) + tl.cumsum(past, 0, reverse=True)
            dg_tile += tl.sum(tl.where(i > j, ahead[None, :], 0.0), 1)
        else:
            whole = (dthrough * tl.exp(tl.sum(g_tile, 0)))[None, :]
            dg_tile = whole + tl.cumsum(past, 0, reverse=True) + tl.dot((i > j).to(tl.float32), ahead, input_precision="tf32x3")
    if beta is not None:
        dk_tile += to_tokens(dk_to, sums, FEATURES)
        drows, dk_tile, dg_tile = scores_vjp(dm, k_tile, k_tile, g_tile, dk_tile, dg_tile, CHUNK, LEVELS, FEATURES, PRECISION)
        dk_tile += drows
    dp = tl.where(i >= j, dp, 0.0)
    drows, dk_tile, dg_tile = scores_vjp(dp, q_tile, k_tile, g_tile, dk_tile, dg_tile, CHUNK, LEVELS, FEATURES, PRECISION)
    dq_tile = scale * (drows + to_tokens(dq_to, sums, FEATURES))
    _store(_at(dq, dq_strides, batch, head), dq_strides, rows, valid, 0, dq_tile, DIM, BLOCK_DIM)
    _store(_at(dk, dk_strides, batch, head), dk_strides, rows, valid, 0, dk_tile, DIM, BLOCK_DIM)
    if dg is not None:
        if FEATURES == 1:
            _store_row(_at(dg, dg_strides, batch, head), dg_strides, rows, valid, dg_tile)
        else:
            _store(_at(dg, dg_strides, batch, head), dg_strides, rows, valid, 0, dg_tile, DIM, BLOCK_DIM)


@triton.jit
def _store_row(base, strides, rows, valid, row):
    tl.store(base + rows.to(tl.int64) * strides[1], row.to(base.dtype.element_ty), mask=valid)
