"""Decays inside a chunk of linear attention, and scores under them, as in longtrain/ops/linear_attention/decay.py: sums of log decays are
made of what lies between two tokens, never as differences and never divided out.

FEATURES: 0 no decay, 1 one a head (g [C]), 2 one a key feature (g [C, D]). Log decays are at least FLOOR, where exp is 0 and sums are
finite.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e4)


@triton.jit
def load_decay(g, strides, rows, valid, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, FEATURES: tl.constexpr):
    """Log decays of the tokens `rows`, 0 where not valid; 0 without decay."""
    if FEATURES == 0:
        return 0.0
    elif FEATURES == 1:
        found = tl.load(g + rows * strides[1], mask=valid, other=0.0).to(tl.float32)
        return tl.where(found < FLOOR, FLOOR, found)
    else:
        dims = tl.arange(0, BLOCK_DIM)
        at = g + rows[:, None] * strides[1] + dims[None, :] * strides[3]
        found = tl.load(at, mask=valid[:, None] & (dims < DIM)[None, :], other=0.0).to(tl.float32)
        return tl.where(found < FLOOR, FLOOR, found)


@triton.jit
def to_tokens(x, sums, FEATURES: tl.constexpr):
    """x [C, D] times exp of the sums [C] or [C, D]."""
    if FEATURES == 0:
        return x
    elif FEATURES == 1:
        return x * tl.exp(sums)[:, None]
    else:
        return x * tl.exp(sums)


@triton.jit
def sums_to(g, FEATURES: tl.constexpr):
    """g_1 + ... + g_i: from the chunk's entry up to and with token i."""
    if FEATURES == 0:
        return 0.0
    else:
        return tl.cumsum(g, 0)


@triton.jit
def sums_behind(
    g, strides, first, stop, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, CHUNK: tl.constexpr, FEATURES: tl.constexpr,
):
    """g_{j+1} + ... + g_c, behind token j to the chunk's end; of tokens first .. stop."""
    if FEATURES == 0:
        return 0.0
    else:
        rows = first + 1 + tl.arange(0, CHUNK)
        shifted = load_decay(g, strides, rows, rows < tl.minimum(stop, first + CHUNK), DIM, BLOCK_DIM, FEATURES)
        return tl.cumsum(shifted, 0, reverse=True)


@triton.jit
def decay_through(state, g, FEATURES: tl.constexpr):
    """state [D, V] times the decay of the whole chunk."""
    if FEATURES == 0:
        return state
    elif FEATURES == 1:
        return state * tl.exp(tl.sum(g, 0))
    else:
        return state * tl.exp(tl.sum(g, 0))[:, None]


@triton.jit
def between(g, CHUNK: tl.constexpr):
    """[i, j]: exp(g_{j+1} + ... + g_i) for j <= i, 0 elsewhere; g [C]."""
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    return tl.where(i >= j, tl.exp(tl.cumsum(tl.where(i > j, g[:, None], 0.0), 0)), 0.0)


@triton.jit
def _in_halves(CHUNK: tl.constexpr, level):
    """Of tokens i and m: whether i is in the later half of its block, halves being 2^level tokens; [i, m] in the same half and m <= i; and
    m > i."""
    i, m = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    same = i >> level == m >> level
    return (i >> level) & 1 == 1, same & (m <= i), same & (m > i)


@triton.jit
def _sides(rows, k, g, CHUNK: tl.constexpr, level):
    """Rows decayed from the middle of their block of two halves, keys decayed up to it, zeros on the other side; and the two decays."""
    later, upto, behind = _in_halves(CHUNK, level)
    to = tl.exp(tl.dot(upto.to(tl.float32), g, input_precision="tf32x3"))
    away = tl.exp(tl.dot(behind.to(tl.float32), g, input_precision="tf32x3"))
    return tl.where(later, rows * to, 0.0), tl.where(later, 0.0, k * away), to, away


@triton.jit
def scores(rows, k, g, CHUNK: tl.constexpr, LEVELS: tl.constexpr, FEATURES: tl.constexpr, PRECISION: tl.constexpr):
    """[i, j]: sum over d of rows_id k_jd exp(g_{j+1,d} + ... + g_{i,d}) for j <= i, 0 elsewhere; rows, k [C, D]."""
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    if FEATURES == 2:
        out = tl.where(i == j, tl.sum(rows * k, 1)[:, None], 0.0)
        for level in tl.range(0, LEVELS, num_stages=1):
            later, earlier, _, _ = _sides(rows, k, g, CHUNK, level)
            met = tl.dot(later, tl.trans(earlier), input_precision=PRECISION)
            out += tl.where(i >> (level + 1) == j >> (level + 1), met, 0.0)
        return out
    else:
        out = tl.dot(rows, tl.trans(k), input_precision=PRECISION)
        if FEATURES == 1:
            return out * between(g, CHUNK)
        else:
            return tl.where(i >= j, out, 0.0)


@triton.jit
def scores_vjp(
    dscores, rows, k, g, dk, dg, CHUNK: tl.constexpr, LEVELS: tl.constexpr, FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):
    """(drows, dk + its gradient, dg + its) of scores whose gradient is 0 above the diagonal."""
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    if FEATURES == 2:
        on_diagonal = tl.sum(tl.where(i == j, dscores, 0.0), 1)[:, None]
        drows = on_diagonal * k
        dk += on_diagonal * rows
        for level in tl.range(0, LEVELS, num_stages=1):
            later, earlier, to, away = _sides(rows, k, g, CHUNK, level)
            in_later, upto, behind = _in_halves(CHUNK, level)
            met = (i >> (level + 1) == j >> (level + 1)) & in_later & ((j >> level) & 1 == 0)
            block = tl.where(met, dscores, 0.0)
            dlater, dearlier = tl.dot(block, earlier, input_precision=PRECISION), tl.dot(tl.trans(block), later, input_precision=PRECISION)
            drows += tl.where(in_later, dlater * to, 0.0)
            dk += tl.where(in_later, 0.0, dearlier * away)
            dg += tl.dot(tl.trans(upto.to(tl.float32)), dlater * later, input_precision="tf32x3")
            dg += tl.dot(tl.trans(behind.to(tl.float32)), dearlier * earlier, input_precision="tf32x3")
        return drows, dk, dg
    else:
        raw = dscores
        if FEATURES == 1:
            raw = dscores * between(g, CHUNK)
            # dg_m: of all pairs j < m <= i, the gradient of their sum
            sums = tl.where(i > j, raw * tl.dot(rows, tl.trans(k), input_precision=PRECISION), 0.0)
            dg += tl.sum(tl.where(i > j, tl.cumsum(sums, 0, reverse=True), 0.0), 1)
        dk += tl.dot(tl.trans(raw), rows, input_precision=PRECISION)
        return tl.dot(raw, k, input_precision=PRECISION), dk, dg
