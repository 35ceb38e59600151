"""Long convolutions of rows as products with matrices (read longtrain/ops/long_conv/monarch.py first: which matrices, and why these).

A program has one row of N = N1 N2 numbers at a time and goes through it tile by tile; between its two matrices the row lies in a scratch
of its own, small enough that all of them stay in the L2 cache. Complex arrays are two planes, real part first. Products are tensor-core
products of the rows' dtype (float32 as three tf32 products), sums float32. Programs share nothing and add in a fixed order.
"""

import triton
import triton.language as tl


@triton.jit
def _times(a_re, a_im, b_re, b_im):
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit
def _complex(base, plane, at):
    """Two planes as float32."""
    return tl.load(base + at).to(tl.float32), tl.load(base + plane + at).to(tl.float32)


@triton.jit
def _put(base, plane, at, x_re, x_im):
    tl.store(base + at, x_re.to(base.dtype.element_ty))
    tl.store(base + plane + at, x_im.to(base.dtype.element_ty))


@triton.jit
def _matrix_times_row(
    f, x_re, x_im, start, N1, N2: tl.constexpr, BLOCK: tl.constexpr, REAL_OUT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr
):
    """Rows start .. start + BLOCK of f x, float32 [BLOCK, N2]; f [3, N1, N1], x [N1, N2], real where x_im is None."""
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, N2)
    y_re = tl.zeros((BLOCK, N2), tl.float32)
    y_im = tl.zeros((BLOCK, N2), tl.float32)
    for n in tl.range(0, N1, BLOCK, num_stages=STAGES):
        f_at = f + (start + rows)[:, None] * N1 + (n + rows)[None, :]
        x_at = (n + rows)[:, None] * N2 + cols[None, :]
        f_re, x = tl.load(f_at), tl.load(x_re + x_at)
        y_re = tl.dot(f_re, x, y_re, input_precision=PRECISION)
        if not REAL_OUT:
            y_im = tl.dot(tl.load(f_at + N1 * N1), x, y_im, input_precision=PRECISION)
        if x_im is not None:
            x = tl.load(x_im + x_at)
            y_re = tl.dot(tl.load(f_at + 2 * N1 * N1), x, y_re, input_precision=PRECISION)
            if not REAL_OUT:
                y_im = tl.dot(f_re, x, y_im, input_precision=PRECISION)
    return y_re, y_im


@triton.jit
def _row_times_matrix(x_re, x_im, f, first, N2: tl.constexpr, COLS: tl.constexpr, INVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """Columns first .. first + COLS of x f, or x times f's conjugate; x [BLOCK, N2], f [2, N2, N2]."""
    at = tl.arange(0, N2)[:, None] * N2 + first + tl.arange(0, COLS)[None, :]
    f_re, f_im = tl.load(f + at), tl.load(f + N2 * N2 + at)
    y_re = tl.dot(x_re, f_re, input_precision=PRECISION)
    y_im = tl.dot(x_im, f_re, input_precision=PRECISION)
    if INVERSE:
        return tl.dot(x_im, f_im, y_re, input_precision=PRECISION), tl.dot(-x_re, f_im, y_im, input_precision=PRECISION)
    else:
        return tl.dot(-x_im, f_im, y_re, input_precision=PRECISION), tl.dot(x_re, f_im, y_im, input_precision=PRECISION)


@triton.jit
def _enter(
    scratch, x_re, x_im, first, twiddle, N1, N2: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """scratch = twiddle * (first x)."""
    for start in tl.range(0, N1, BLOCK, num_stages=1):
        at = (start + tl.arange(0, BLOCK))[:, None] * N2 + tl.arange(0, N2)[None, :]
        a_re, a_im = _matrix_times_row(first, x_re, x_im, start, N1, N2, BLOCK, False, PRECISION, STAGES)
        t_re, t_im = _complex(twiddle, N1 * N2, at)
        a_re, a_im = _times(a_re, a_im, t_re, t_im)
        _put(scratch, N1 * N2, at, a_re, a_im)


@triton.jit
def _leave(
    y_re, y_im, scratch, last, N1, N2: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """y = last scratch; its real part alone where y_im is None."""
    for start in tl.range(0, N1, BLOCK, num_stages=1):
        at = (start + tl.arange(0, BLOCK))[:, None] * N2 + tl.arange(0, N2)[None, :]
        a_re, a_im = _matrix_times_row(last, scratch, scratch + N1 * N2, start, N1, N2, BLOCK, y_im is None, PRECISION, STAGES)
        tl.store(y_re + at, a_re.to(y_re.dtype.element_ty))
        if y_im is not None:
            tl.store(y_im + at, a_im.to(y_im.dtype.element_ty))


@triton.jit
def _back_through(scratch, values_re, values_im, columns, twiddle, at, N1, N2: tl.constexpr, PRECISION: tl.constexpr):
    """From values at the roots to what `_leave` takes, a tile."""
    kind = scratch.dtype.element_ty
    c_re, c_im = _row_times_matrix(values_re.to(kind), values_im.to(kind), columns, 0, N2, N2, True, PRECISION)
    t_re, t_im = _complex(twiddle, N1 * N2, at)
    c_re, c_im = _times(c_re, c_im, t_re, -t_im)
    _put(scratch, N1 * N2, at, c_re, c_im)


@triton.jit
def _plane(base, offset):
    """base + offset; None stays None."""
    if base is None:
        return base
    else:
        return base + offset


@triton.jit(do_not_specialize=["count"])
def monarch_spectrum(
    x_re, x_im, spectrum, scratch, first, twiddle, columns, count, scale, N1, N2: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """spectrum [count, 2, N] = scale * transform of x [count, N]; x_im may be None. Grid: any number of programs."""
    N = N1 * N2
    scratch += tl.program_id(0).to(tl.int64) * 2 * N
    for turn in tl.range(0, tl.cdiv(count - tl.program_id(0), tl.num_programs(0)), num_stages=1):
        row = (tl.program_id(0) + turn * tl.num_programs(0)).to(tl.int64) * N
        _enter(scratch, x_re + row, _plane(x_im, row), first, twiddle, N1, N2, BLOCK, PRECISION, STAGES)
        tl.debug_barrier()
        for start in tl.range(0, N1, BLOCK, num_stages=1):
            at = (start + tl.arange(0, BLOCK))[:, None] * N2 + tl.arange(0, N2)[None, :]
            b_re, b_im = _row_times_matrix(tl.load(scratch + at), tl.load(scratch + N + at), columns, 0, N2, N2, False, PRECISION)
            _put(spectrum + 2 * row, N, at, b_re * scale, b_im * scale)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["count", "outer", "width", "share", "shift"])
def monarch_convolve(
    x_re, x_im, spectrum, scratch, first, last, twiddle, columns, count, outer, width, share, shift, N1, N2: tl.constexpr,
    CONJUGATE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """x [count, N] = inverse transform of (transform of x times the spectrum of its channel, or its conjugate), in place.

    A row is (piece, batch, channel, outer); channel e of `width` has the filter (e + shift) // share, and spectrum is
    [filters, outer, 2, N]. With x_im None rows are real, going in and coming out. Grid: any number of programs.
    """
    N = N1 * N2
    scratch += tl.program_id(0).to(tl.int64) * 2 * N
    for turn in tl.range(0, tl.cdiv(count - tl.program_id(0), tl.num_programs(0)), num_stages=1):
        index = tl.program_id(0) + turn * tl.num_programs(0)
        row = index.to(tl.int64) * N
        k = spectrum + (((index // outer % width + shift) // share) * outer + index % outer).to(tl.int64) * 2 * N
        _enter(scratch, x_re + row, _plane(x_im, row), first, twiddle, N1, N2, BLOCK, PRECISION, STAGES)
        tl.debug_barrier()
        for start in tl.range(0, N1, BLOCK, num_stages=1):
            at = (start + tl.arange(0, BLOCK))[:, None] * N2 + tl.arange(0, N2)[None, :]
            b_re, b_im = _row_times_matrix(tl.load(scratch + at), tl.load(scratch + N + at), columns, 0, N2, N2, False, PRECISION)
            k_re, k_im = _complex(k, N, at)
            if CONJUGATE:
                k_im = -k_im
            b_re, b_im = _times(b_re, b_im, k_re, k_im)
            _back_through(scratch, b_re, b_im, columns, twiddle, at, N1, N2, PRECISION)
        tl.debug_barrier()
        _leave(x_re + row, _plane(x_im, row), scratch, last, N1, N2, BLOCK, PRECISION, STAGES)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["filters", "groups", "outer", "width", "share", "shift"])
def monarch_correlate(
    v_re, v_im, g_re, g_im, out_re, out_im, scratch, sums, first, last, twiddle, columns, filters, groups, outer, width, share, shift, N1,
    N2: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """out [filters, outer, N] = inverse transform of the sum, over rows of the filter, of conj(transform of v) times transform of g.

    Rows as in `monarch_convolve`, of `groups` pieces and rows of the batch. out_im None: the real part alone. scratch: two rows a
    program; sums: one, float32. Grid: any number of programs.
    """
    N = N1 * N2
    scratch += tl.program_id(0).to(tl.int64) * 4 * N
    sums += tl.program_id(0).to(tl.int64) * 2 * N
    for turn in tl.range(0, tl.cdiv(filters * outer - tl.program_id(0), tl.num_programs(0)), num_stages=1):
        index = tl.program_id(0) + turn * tl.num_programs(0)
        low = tl.maximum(0, index // outer * share - shift)
        channels = tl.minimum(width, (index // outer + 1) * share - shift) - low
        for term in tl.range(0, channels * groups, num_stages=1):
            row = ((term // channels).to(tl.int64) * width + low + term % channels) * outer + index % outer
            row *= N
            _enter(scratch, v_re + row, _plane(v_im, row), first, twiddle, N1, N2, BLOCK, PRECISION, STAGES)
            _enter(scratch + 2 * N, g_re + row, _plane(g_im, row), first, twiddle, N1, N2, BLOCK, PRECISION, STAGES)
            tl.debug_barrier()
            for start in tl.range(0, N1, BLOCK, num_stages=1):
                for col in tl.range(0, N2, COLS, num_stages=1):
                    rows = (start + tl.arange(0, BLOCK))[:, None] * N2
                    v_at = scratch + rows + tl.arange(0, N2)[None, :]
                    v_a, v_b = _row_times_matrix(tl.load(v_at), tl.load(v_at + N), columns, col, N2, COLS, False, PRECISION)
                    g_a, g_b = _row_times_matrix(tl.load(v_at + 2 * N), tl.load(v_at + 3 * N), columns, col, N2, COLS, False, PRECISION)
                    p_re, p_im = _times(v_a, -v_b, g_a, g_b)
                    at = rows + col + tl.arange(0, COLS)[None, :]
                    if term > 0:
                        s_re, s_im = _complex(sums, N, at)
                        p_re += s_re
                        p_im += s_im
                    _put(sums, N, at, p_re, p_im)
            tl.debug_barrier()
        for start in tl.range(0, N1, BLOCK, num_stages=1):
            at = (start + tl.arange(0, BLOCK))[:, None] * N2 + tl.arange(0, N2)[None, :]
            s_re, s_im = _complex(sums, N, at)
            _back_through(scratch, s_re, s_im, columns, twiddle, at, N1, N2, PRECISION)
        tl.debug_barrier()
        row = index.to(tl.int64) * N
        _leave(out_re + row, _plane(out_im, row), scratch, last, N1, N2, BLOCK, PRECISION, STAGES)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["outer", "padded"])
def monarch_outer(
    x_re, x_im, y_re, y_im, f, high, low, outer, padded, N1, N2: tl.constexpr, INVERSE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """The outer matrix of order 3, [rows, outer, N1 N2] to the same: y = twiddle * (f x), or back: y = f (conj(twiddle) * x).

    f [3, padded, padded]. x_im, y_im None: real going in, the real part coming out. Grid: (rows, N1, padded / BLOCK).
    """
    inner = N1 * N2
    column, start = tl.program_id(1), tl.program_id(2) * BLOCK
    base = tl.program_id(0).to(tl.int64) * outer * inner + column * N2
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, N2)
    kind = f.dtype.element_ty
    y_a = tl.zeros((BLOCK, N2), tl.float32)
    y_b = tl.zeros((BLOCK, N2), tl.float32)
    for n in tl.range(0, padded, BLOCK, num_stages=STAGES):
        at = base + (n + rows)[:, None] * inner + cols[None, :]
        inside = (n + rows < outer)[:, None]
        f_at = f + (start + rows)[:, None] * padded + (n + rows)[None, :]
        x_a = tl.load(x_re + at, mask=inside, other=0.0)
        f_re = tl.load(f_at)
        if x_im is None:
            y_a = tl.dot(f_re, x_a, y_a, input_precision=PRECISION)
            y_b = tl.dot(tl.load(f_at + padded * padded), x_a, y_b, input_precision=PRECISION)
        else:
            x_b = tl.load(x_im + at, mask=inside, other=0.0)
            if INVERSE:
                t_re, t_im = _outer_twiddle(high, low, n + rows, column, cols, padded, N1, N2)
                x_a, x_b = _times(x_a.to(tl.float32), x_b.to(tl.float32), t_re, -t_im)
            x_a, x_b = x_a.to(kind), x_b.to(kind)
            y_a = tl.dot(f_re, x_a, y_a, input_precision=PRECISION)
            y_a = tl.dot(tl.load(f_at + 2 * padded * padded), x_b, y_a, input_precision=PRECISION)
            if y_im is not None:
                y_b = tl.dot(tl.load(f_at + padded * padded), x_a, y_b, input_precision=PRECISION)
                y_b = tl.dot(f_re, x_b, y_b, input_precision=PRECISION)
    at = base + (start + rows)[:, None] * inner + cols[None, :]
    inside = (start + rows < outer)[:, None]
    if not INVERSE:
        t_re, t_im = _outer_twiddle(high, low, start + rows, column, cols, padded, N1, N2)
        y_a, y_b = _times(y_a, y_b, t_re, t_im)
    tl.store(y_re + at, y_a.to(y_re.dtype.element_ty), mask=inside)
    if y_im is not None:
        tl.store(y_im + at, y_b.to(y_im.dtype.element_ty), mask=inside)


@triton.jit
def _outer_twiddle(high, low, rows, column, cols, padded, N1, N2: tl.constexpr):
    h_re, h_im = _complex(high, padded * N1, rows * N1 + column)
    l_re, l_im = _complex(low, padded * N2, rows[:, None] * N2 + cols[None, :])
    return _times(h_re[:, None], h_im[:, None], l_re, l_im)
