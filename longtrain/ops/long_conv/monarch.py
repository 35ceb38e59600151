"""How a long convolution is cut for the Monarch kernels: documents into rows, a row's transform into products with matrices, the matrices.

A row of at most N real tokens is a polynomial modulo x^2N + 1, which is N complex numbers modulo z^N - i (as in `csrc/long_conv_fft.h`):
products there are products of the values at the N roots. With e(a) = exp(2 pi i a), N = N1 N2, n = n1 N2 + n2, k = k1 + N1 k2:

    sum_n x_n e((k + 1/4) n / N)  =  sum_n2 e(k2 n2 / N2)  [ e((k1 + 1/4) n2 / N)  sum_n1 e((k1 + 1/4) n1 / N1) x_n ]

that is a matrix, elements ("twiddles") and a matrix: order 2 (Monarch, arXiv:2204.00595; FlashFFTConv, arXiv:2311.05908, section 3.1).
Order 3 has one more matrix of N0 in front of it, and then the 1/4 belongs to that one. Values stay where k1 and k2 put them. Matrices are
divided by the root of their size, so that no sum grows; any size will do, it need not be a power of two.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longtrain.ops.long_conv.call import Call, reach

FUSED, INNER, OUTER = 32_768, 16_384, 256
"""Longest row of order 2; what is left of a longer one behind its outer matrix; the largest outer matrix: 4 Mi tokens in all."""


@dataclass(frozen=True, slots=True)
class Size:
    """A transform of N = `outer` * `rows` * `columns` complex numbers; `outer` is 1 in order 2."""

    outer: int
    rows: int
    columns: int

    @property
    def inner(self) -> int:
        return self.rows * self.columns

    @property
    def total(self) -> int:
        return self.outer * self.inner

    @property
    def padded_outer(self) -> int:
        """`outer` in whole tiles."""
        return -(-self.outer // self.outer_block) * self.outer_block

    @property
    def outer_block(self) -> int:
        return 16 if self.outer <= 16 else 32 if self.outer <= 32 else 64

    @property
    def cost(self) -> float:
        """Of a row, in arbitrary units: what the matrices multiply, and about as much again for what moves."""
        return self.total * (self.rows + self.columns + 128 + (self.outer + 256 if self.outer > 1 else 0))


def size_of(length: int, itemsize: int) -> Size | None:
    """The transform for rows of `length` tokens of `itemsize` bytes, None where it would have to be of order 4."""
    most = 128 if itemsize == 2 else 64  # float32 tiles take twice the room
    if length > FUSED:
        outer = -(-length // INNER)
        return None if outer > OUTER else Size(outer, INNER // most, most)
    columns = min(most, max(16, 1 << math.ceil(math.log2(max(1, length)) / 2)))
    rows = max(16, -(-length // columns))
    return Size(1, 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64, columns)


Piece = tuple[int, int, int, int]
"""in_start, in_stop, out_start, out_stop: a row holds the tokens from in_start to in_stop and gives the outputs of the other two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Rows of one size, and the taps that they meet."""

    size: Size
    past: int
    future: int
    """As in `reach`, the most of any document."""
    pieces: tuple[Piece, ...]
    mirrored: tuple[Piece, ...]
    """The same for filters read backwards, as the gradient of the input needs them."""

    @property
    def whole(self) -> bool:
        """Whether every row gives an output for each token that it holds."""
        return all(piece[:2] == piece[2:] for piece in self.pieces)


def works(call: Call) -> list[Work] | None:
    """Each document whole, or in overlapping pieces where the filter is much shorter (overlap-save), whichever costs less; None for a
    document that is too long."""
    found: dict[Size, tuple[list[int], list[int], list[Piece], list[Piece]]] = {}
    for document in call.documents:
        start, stop = document.start, document.stop
        past, future = reach(call.k_HW.shape[1], stop - start, call.causal)
        margin = past - 1 + future
        chosen = size_of(stop - start, narrow(call).itemsize)
        step, least = stop - start, math.inf if chosen is None else chosen.cost
        for length in (1024 << i for i in range(6)):
            size = size_of(length, narrow(call).itemsize)
            if margin < length < stop - start and (cost := -(-(stop - start) // (length - margin)) * size.cost) < least:
                chosen, step, least = size, length - margin, cost
        if chosen is None:
            return None
        pasts, futures, pieces, mirrored = found.setdefault(chosen, ([], [], [], []))
        pasts.append(past)
        futures.append(future)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            pieces.append((max(start, first - past + 1), min(stop, last + future), first, last))
            mirrored.append((max(start, first - future), min(stop, last + past - 1), first, last))
    return [
        Work(size=size, past=max(pasts), future=max(futures), pieces=tuple(pieces), mirrored=tuple(mirrored))
        for size, (pasts, futures, pieces, mirrored) in found.items()
    ]


def narrow(call: Call) -> torch.dtype:
    """What the factors of matrix products are rounded to: u's dtype. Their sums are float32."""
    return call.u_BTE.dtype


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Matrices:
    """The constants of a size. Parts are stacked in front: real, imaginary and, of three, minus the imaginary."""

    first: Tensor
    """``[3, N1, N1]``"""
    last: Tensor
    """Its inverse."""
    twiddle: Tensor
    """``[2, N1, N2]``"""
    columns: Tensor
    """``[3, N2, N2]``"""
    outer_first: Tensor | None
    """``[3, N0, N0]``, zeros up to whole tiles"""
    outer_last: Tensor | None
    outer_high: Tensor | None
    """``[2, N0, N1]`` and `outer_low` ``[2, N0, N2]``: twiddles of column n1 N2 + n2 behind the outer matrix are their products."""
    outer_low: Tensor | None


def _root(turns: Tensor, scale: float = 1.0) -> Tensor:
    return torch.polar(torch.full_like(turns, scale), 2 * math.pi * turns.frac())


def _parts(x: Tensor, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.stack((x.real, x.imag, -x.imag)[:count]).to(dtype).to(device).contiguous()


@functools.lru_cache(maxsize=32)
def matrices(size: Size, dtype: torch.dtype, device: torch.device) -> Matrices:
    """Made in float64. Twiddles of 16-bit types are float16: they are at most 1 and only multiply elements, so bfloat16 would lose for
    nothing."""
    rows, columns, outer = (torch.arange(n, dtype=torch.float64) for n in (size.rows, size.columns, size.outer))
    begin = 0.25 if size.outer == 1 else 0.0
    first = _root((rows[:, None] + begin) * rows / size.rows, size.rows**-0.5)
    twiddle = _root((rows[:, None] + begin) * columns / size.inner)
    fine = torch.float32 if dtype == torch.float32 else torch.float16
    constants = dict.fromkeys(("outer_first", "outer_last", "outer_high", "outer_low"))
    if size.outer > 1:
        missing = size.padded_outer - size.outer

        def padded(x: Tensor, *sides: int) -> Tensor:
            return torch.nn.functional.pad(x, sides)

        whole = _root((outer[:, None] + 0.25) * outer / size.outer, size.outer**-0.5)
        constants = {
            "outer_first": _parts(padded(whole, 0, missing, 0, missing), 3, dtype, device),
            "outer_last": _parts(padded(whole.conj().mT.resolve_conj(), 0, missing, 0, missing), 3, dtype, device),
            "outer_high": _parts(
                padded(_root((outer[:, None] + 0.25) * rows / (size.outer * size.rows)), 0, 0, 0, missing), 2, torch.float32, device
            ),
            "outer_low": _parts(padded(_root((outer[:, None] + 0.25) * columns / size.total), 0, 0, 0, missing), 2, torch.float32, device),
        }
    return Matrices(
        first=_parts(first, 3, dtype, device),
        last=_parts(first.conj().mT.resolve_conj(), 3, dtype, device),
        twiddle=_parts(twiddle, 2, fine, device),
        columns=_parts(_root(columns[:, None] * columns / size.columns, size.columns**-0.5), 3, dtype, device),
        **constants,
    )
