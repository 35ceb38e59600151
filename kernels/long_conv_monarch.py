"""Long convolutions of rows as products with matrices (read longtrain/ops/long_conv/monarch.py first: which matrices, and why these).

A program has one row of N = N1 N2 numbers at a time and goes through it tile by tile; between products the row lies in a scratch of its
own, small enough that all of them stay in the L2 cache. Complex arrays are two planes, real part first; a plane's distance None says that
there is no imaginary part, which is 0 or not wanted. A complex product is one real product twice as deep, with real parts and then
imaginary parts; matrices come as three planes, real, imaginary and minus imaginary, to fit. Products are tensor-core products of the
rows' dtype (float32 as three tf32 products), sums float32. Programs share nothing and add in a fixed order.
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
    if plane is not None:
        tl.store(base + plane + at, x_im.to(base.dtype.element_ty))


@triton.jit
def _tile(start, N2: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of rows start .. start + BLOCK."""
    return (start + tl.arange(0, BLOCK))[:, None] * N2 + tl.arange(0, N2)[None, :]


@triton.jit
def _matrix_times_row(
    f, x, plane, start, N1, N2: tl.constexpr, BLOCK: tl.constexpr, REAL_OUT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr
):
    """Rows start .. start + BLOCK of f x, float32 [BLOCK, N2]; f [3, N1, N1], x [N1, N2]."""
    rows = tl.arange(0, BLOCK)
    y_re = tl.zeros((BLOCK, N2), tl.float32)
    y_im = tl.zeros((BLOCK, N2), tl.float32)
    depth = N1 if plane is None else 2 * N1
    for n in tl.range(0, depth, BLOCK, num_stages=STAGES):
        part = n // N1
        f_at = f + (start + rows)[:, None] * N1 + (n - part * N1 + rows)[None, :]
        x_at = x + _tile(n - part * N1, N2, BLOCK)
        if plane is not None:
            x_at += part * plane
        x_tile = tl.load(x_at)
        y_re = tl.dot(tl.load(f_at + 2 * part * N1 * N1), x_tile, y_re, input_precision=PRECISION)
        if not REAL_OUT:
            y_im = tl.dot(tl.load(f_at + (1 - part) * N1 * N1), x_tile, y_im, input_precision=PRECISION)
    return y_re, y_im


@triton.jit
def _row_times_matrix(
    x, start, f, first, N1, N2: tl.constexpr, INVERSE: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """Columns first .. first + COLS of rows start .. start + BLOCK of x f, or of x times f's conjugate; x [2, N1, N2], f [3, N2, N2]."""
    rows, depth, cols = tl.arange(0, BLOCK), tl.arange(0, DEPTH), tl.arange(0, COLS)
    y_re = tl.zeros((BLOCK, COLS), tl.float32)
    y_im = tl.zeros((BLOCK, COLS), tl.float32)
    for n in tl.range(0, 2 * N2, DEPTH, num_stages=STAGES):
        part = n // N2
        x_tile = tl.load(x + part * N1 * N2 + (start + rows)[:, None] * N2 + (n - part * N2 + depth)[None, :])
        f_at = f + (n - part * N2 + depth)[:, None] * N2 + (first + cols)[None, :]
        if INVERSE:
            at_re, at_im = part, 2 - 2 * part
        else:
            at_re, at_im = 2 * part, 1 - part
        y_re = tl.dot(x_tile, tl.load(f_at + at_re * N2 * N2), y_re, input_precision=PRECISION)
        y_im = tl.dot(x_tile, tl.load(f_at + at_im * N2 * N2), y_im, input_precision=PRECISION)
    return y_re, y_im


@triton.jit
def _enter(
    scratch, x, plane, first, twiddle, N1, N2: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """scratch = twiddle * (first x)."""
    for start in tl.range(0, N1, BLOCK, num_stages=1):
        at = _tile(start, N2, BLOCK)
        a_re, a_im = _matrix_times_row(first, x, plane, start, N1, N2, BLOCK, False, PRECISION, STAGES)
        t_re, t_im = _complex(twiddle, N1 * N2, at)
        a_re, a_im = _times(a_re, a_im, t_re, t_im)
        _put(scratch, N1 * N2, at, a_re, a_im)


@triton.jit
def _back_through(
    scratch, start, x_re, x_im, f, twiddle, N1, N2: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """From values at the roots [BLOCK, N2] to what `_leave` takes: times f's conjugate and the conjugate twiddle.

    The values go through the scratch as well: kept in registers they would leave no room for products.
    """
    at = _tile(start, N2, BLOCK)
    tl.debug_barrier()  # all of the program are done with what these rows held
    _put(scratch, N1 * N2, at, x_re, x_im)
    tl.debug_barrier()
    y_re, y_im = _row_times_matrix(scratch, start, f, 0, N1, N2, True, N2, BLOCK, DEPTH, PRECISION, STAGES)
    t_re, t_im = _complex(twiddle, N1 * N2, at)
    y_re, y_im = _times(y_re, y_im, t_re, -t_im)
    tl.debug_barrier()
    _put(scratch, N1 * N2, at, y_re, y_im)


@triton.jit
def _leave(
    y, plane, scratch, last, N1, N2: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """y = last scratch."""
    for start in tl.range(0, N1, BLOCK, num_stages=1):
        a_re, a_im = _matrix_times_row(last, scratch, N1 * N2, start, N1, N2, BLOCK, plane is None, PRECISION, STAGES)
        _put(y, plane, _tile(start, N2, BLOCK), a_re, a_im)


@triton.jit(do_not_specialize=["count"])
def monarch_spectrum(
    x, plane, spectrum, scratch, first, twiddle, columns, count, scale, N1, N2: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """spectrum [count, 2, N] = scale * transform of x [count, N]. Grid: any number of programs."""
    N = N1 * N2
    scratch += tl.program_id(0).to(tl.int64) * 2 * N
    for turn in tl.range(0, tl.cdiv(count - tl.program_id(0), tl.num_programs(0)), num_stages=1):
        row = (tl.program_id(0) + turn * tl.num_programs(0)).to(tl.int64) * N
        _enter(scratch, x + row, plane, first, twiddle, N1, N2, BLOCK, PRECISION, STAGES)
        tl.debug_barrier()
        for start in tl.range(0, N1, BLOCK, num_stages=1):
            b_re, b_im = _row_times_matrix(scratch, start, columns, 0, N1, N2, False, N2, BLOCK, DEPTH, PRECISION, STAGES)
            _put(spectrum + 2 * row, N, _tile(start, N2, BLOCK), b_re * scale, b_im * scale)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["count", "outer", "width", "share", "shift"])
def monarch_convolve(
    x, plane, spectrum, scratch, first, last, twiddle, columns, count, outer, width, share, shift, N1, N2: tl.constexpr,
    CONJUGATE: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """x [count, N] = inverse transform of (transform of x times the spectrum of its channel, or its conjugate), in place.

    A row is (piece, batch, channel, outer); channel e of `width` has the filter (e + shift) // share, and spectrum is
    [filters, outer, 2, N]. Grid: any number of programs.
    """
    N = N1 * N2
    scratch += tl.program_id(0).to(tl.int64) * 2 * N
    for turn in tl.range(0, tl.cdiv(count - tl.program_id(0), tl.num_programs(0)), num_stages=1):
        index = tl.program_id(0) + turn * tl.num_programs(0)
        row = index.to(tl.int64) * N
        k = spectrum + (((index // outer % width + shift) // share) * outer + index % outer).to(tl.int64) * 2 * N
        _enter(scratch, x + row, plane, first, twiddle, N1, N2, BLOCK, PRECISION, STAGES)
        tl.debug_barrier()
        for start in tl.range(0, N1, BLOCK, num_stages=1):
            b_re, b_im = _row_times_matrix(scratch, start, columns, 0, N1, N2, False, N2, BLOCK, DEPTH, PRECISION, STAGES)
            k_re, k_im = _complex(k, N, _tile(start, N2, BLOCK))
            if CONJUGATE:
                k_im = -k_im
            b_re, b_im = _times(b_re, b_im, k_re, k_im)
            _back_through(scratch, start, b_re, b_im, columns, twiddle, N1, N2, BLOCK, DEPTH, PRECISION, STAGES)
        tl.debug_barrier()
        _leave(x + row, plane, scratch, last, N1, N2, BLOCK, PRECISION, STAGES)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["filters", "groups", "outer", "width", "share", "shift"])
def monarch_correlate(
    v, g, plane, out, out_plane, scratch, sums, first, last, twiddle, columns, filters, groups, outer, width, share, shift, N1,
    N2: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """out [filters, outer, N] = inverse transform of the sum, over rows of the filter, of conj(transform of v) times transform of g.

    Rows as in `monarch_convolve`, of `groups` pieces and rows of the batch. scratch: two rows a program; sums: one, float32. Grid: any
    number of programs.
    """
    N = N1 * N2
    scratch += tl.program_id(0).to(tl.int64) * 4 * N
    sums += tl.program_id(0).to(tl.int64) * 2 * N
    for turn in tl.range(0, tl.cdiv(filters * outer - tl.program_id(0), tl.num_programs(0)), num_stages=1):
        index = tl.program_id(0) + turn * tl.num_programs(0)
        low = tl.maximum(0, index // outer * share - shift)
        channels = tl.minimum(width, (index // outer + 1) * share - shift) - low
        for term in tl.range(0, channels * groups, num_stages=1):
            row = (((term // channels).to(tl.int64) * width + low + term % channels) * outer + index % outer) * N
            _enter(scratch, v + row, plane, first, twiddle, N1, N2, BLOCK, PRECISION, STAGES)
            _enter(scratch + 2 * N, g + row, plane, first, twiddle, N1, N2, BLOCK, PRECISION, STAGES)
            tl.debug_barrier()
            for start in tl.range(0, N1, BLOCK, num_stages=1):
                for col in tl.range(0, N2, COLS, num_stages=1):
                    v_re, v_im = _row_times_matrix(scratch, start, columns, col, N1, N2, False, COLS, BLOCK, DEPTH, PRECISION, STAGES)
                    g_re, g_im = _row_times_matrix(
                        scratch + 2 * N, start, columns, col, N1, N2, False, COLS, BLOCK, DEPTH, PRECISION, STAGES
                    )
                    p_re, p_im = _times(v_re, -v_im, g_re, g_im)
                    at = (start + tl.arange(0, BLOCK))[:, None] * N2 + col + tl.arange(0, COLS)[None, :]
                    if term > 0:
                        s_re, s_im = _complex(sums, N, at)
                        p_re += s_re
                        p_im += s_im
                    _put(sums, N, at, p_re, p_im)
            tl.debug_barrier()
        for start in tl.range(0, N1, BLOCK, num_stages=1):
            s_re, s_im = _complex(sums, N, _tile(start, N2, BLOCK))
            _back_through(scratch, start, s_re, s_im, columns, twiddle, N1, N2, BLOCK, DEPTH, PRECISION, STAGES)
        tl.debug_barrier()
        _leave(out + index.to(tl.int64) * N, out_plane, scratch, last, N1, N2, BLOCK, PRECISION, STAGES)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["outer", "padded"])
def monarch_outer(
    x, plane, y, y_plane, f, high, low, outer, padded, N1, N2: tl.constexpr, INVERSE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """The outer matrix of order 3, [rows, outer, N1 N2] to the same: y = twiddle * (f x), or back: y = f (conj(twiddle) * x).

    f [3, padded, padded]. Grid: (rows, N1, padded / BLOCK).
    """
    inner = N1 * N2
    column, start = tl.program_id(1), tl.program_id(2) * BLOCK
    base = tl.program_id(0).to(tl.int64) * outer * inner + column * N2
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, N2)
    y_re = tl.zeros((BLOCK, N2), tl.float32)
    y_im = tl.zeros((BLOCK, N2), tl.float32)
    depth = padded if plane is None else 2 * padded
    for n in tl.range(0, depth, BLOCK, num_stages=STAGES):
        part = n // padded
        deep = n - part * padded + rows
        inside = (deep < outer)[:, None]
        x_at = x + base + deep[:, None] * inner + cols[None, :]
        if INVERSE:
            # x becomes conj(twiddle) * x, of which this turn takes the real or the imaginary part
            x_re = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
            x_im = tl.load(x_at + plane, mask=inside, other=0.0).to(tl.float32)
            t_re, t_im = _outer_twiddle(high, low, deep, column, cols, padded, N1, N2)
            x_re, x_im = _times(x_re, x_im, t_re, -t_im)
            x_tile = tl.where(part == 0, x_re, x_im)
        elif plane is not None:
            x_tile = tl.load(x_at + part * plane, mask=inside, other=0.0)
        else:
            x_tile = tl.load(x_at, mask=inside, other=0.0)
        x_tile = x_tile.to(f.dtype.element_ty)
        f_at = f + (start + rows)[:, None] * padded + deep[None, :]
        y_re = tl.dot(tl.load(f_at + 2 * part * padded * padded), x_tile, y_re, input_precision=PRECISION)
        if y_plane is not None:
            y_im = tl.dot(tl.load(f_at + (1 - part) * padded * padded), x_tile, y_im, input_precision=PRECISION)
    if not INVERSE:
        t_re, t_im = _outer_twiddle(high, low, start + rows, column, cols, padded, N1, N2)
        y_re, y_im = _times(y_re, y_im, t_re, t_im)
    at = y + base + (start + rows)[:, None] * inner + cols[None, :]
    inside = (start + rows < outer)[:, None]
    tl.store(at, y_re.to(y.dtype.element_ty), mask=inside)
    if y_plane is not None:
        tl.store(at + y_plane, y_im.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _outer_twiddle(high, low, rows, column, cols, padded, N1, N2: tl.constexpr):
    h_re, h_im = _complex(high, padded * N1, rows * N1 + column)
    l_re, l_im = _complex(low, padded * N2, rows[:, None] * N2 + cols[None, :])
    return _times(h_re[:, None], h_im[:, None], l_re, l_im)
