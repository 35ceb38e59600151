"""What the attention kernels share: documents, which tiles a tile meets, who is visible, loading, dropout.

Everything is counted in key indices: query i stands at key index i + (q_shift - k_offset). A document is then eleven
numbers (`DOCUMENT`), made on the host, and query i sees key j of its document when

    i + low <= j <= i + high                          the window and causality together: "near"
    or   (j is a sink or in a kept block) and j <= i + diagonal                          "special"

Near keys come as tiles of neighbours. Special keys outside the window are numbered through, sinks first, and a tile of
them is gathered: no work is spent on the keys between them, whatever the block and the stride.
"""

import triton
import triton.language as tl

DOCUMENT = (
    "q_start", "q_stop", "k_start", "k_stop", "low", "high", "diagonal", "sink_start", "sink_stop", "phase", "q_shift",
)
"""Of a document: its queries and keys; the bounds above; its sink tokens; `phase`, so that key j is in a kept block when
(j + phase) mod period < block; and the shift from query index to position, modulo 2^32 (for dropout)."""
FAR = 2**30
"""Stands for unbounded. Indices are below 2^29, so that sums of an index and a bound stay in 32 bits."""
VARYING = [
    "documents_count", "queries", "keys", "low", "high", "diagonal", "sink_start", "sink_stop", "phase", "q_shift",
    "seed_low", "seed_high", "head_offset", "k_offset", "threshold",
]
"""Numbers of a call that kernels are not compiled anew for."""

_COLUMNS = tl.constexpr(len(DOCUMENT))
_CHAIN_A, _CHAIN_B = tl.constexpr(0x9E3779B9), tl.constexpr(0x85EBCA6B)  # as in longtrain/ops/attention/mask.py
LOG2E = tl.constexpr(1.44269504088896340736)
LN2 = tl.constexpr(0.69314718055994530942)


@triton.jit
def find_document(documents, document, tile, count, COLUMN: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """(document, tile inside it) for a tile of the pack. Document d has the tiles from start_d // BLOCK + d on: that is
    never too few, whatever the lengths, so the table of documents need not know the size of a tile."""
    if PACKED:
        low, high = 0, count - 1
        while low < high:
            middle = (low + high + 1) // 2
            if tl.load(documents + middle * _COLUMNS + COLUMN) // BLOCK + middle <= tile:
                low = middle
            else:
                high = middle - 1
        found = load_document(documents, low)
        return found, tile - (tl.load(documents + low * _COLUMNS + COLUMN) // BLOCK + low)
    else:
        return document, tile


@triton.jit
def load_document(documents, index):
    row = documents + index * _COLUMNS
    return (
        tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5),
        tl.load(row + 6), tl.load(row + 7), tl.load(row + 8), tl.load(row + 9), tl.load(row + 10),
    )


@triton.jit
def met_tiles(first, last, start, stop, low, high, BLOCK: tl.constexpr):
    """Tiles of [start, stop) that rows first..last meet, row r meeting [r + low, r + high]: (a, b, c, d), of which the
    tiles [b, c) are met wholly by every row and [a, b), [c, d) must be masked."""
    a = (tl.maximum(start, first + low) - start) // BLOCK
    d = tl.maximum(a, tl.cdiv(tl.maximum(tl.minimum(stop, last + high + 1), start) - start, BLOCK))
    b = tl.minimum(d, tl.cdiv(tl.maximum(start, last + low) - start, BLOCK))
    c = tl.maximum(b, (tl.maximum(tl.minimum(stop, first + high + 1), start) - start) // BLOCK)
    return a, b, c, d


@triton.jit
def near(i, j, low, high):
    return (j >= i + low) & (j <= i + high)


@triton.jit
def count_specials(document, stop, BLOCK: tl.constexpr, PERIOD: tl.constexpr):
    """(number of sinks, of sinks and keys of kept blocks) of a document before key `stop`."""
    stop = tl.minimum(stop, document[3])
    sinks = tl.maximum(0, tl.minimum(document[8], stop) - tl.maximum(document[7], document[2]))
    total = sinks
    if PERIOD > 0:
        before = (document[2] + document[9]) // PERIOD
        total += tl.maximum(0, tl.cdiv(tl.maximum(stop + document[9], 0), PERIOD) - before) * BLOCK
    return sinks, total


@triton.jit
def special_keys(document, t, sinks, total, BLOCK: tl.constexpr, PERIOD: tl.constexpr):
    """(keys j, whether each counts) of the special keys numbered t; one that is a sink and in a kept block counts once."""
    j = tl.maximum(document[7], document[2]) + t
    counts = t < sinks
    if PERIOD > 0:
        before = (document[2] + document[9]) // PERIOD
        u = tl.maximum(t - sinks, 0)
        kept = (before + u // BLOCK) * PERIOD - document[9] + u % BLOCK
        j = tl.where(counts, j, kept)
        sink = (kept >= document[7]) & (kept < document[8])
        counts |= (t < total) & (kept >= document[2]) & (kept < document[3]) & ~sink
    return tl.where(counts, j, document[2]), counts


@triton.jit
def load_rows(base, rows, row_stride, dim_stride, valid, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[rows, BLOCK_DIM] from base; zeros where not `valid` and beyond DIM. `valid` None: every row is."""
    dims = tl.arange(0, BLOCK_DIM)
    at = base + rows[:, None] * row_stride + dims[None, :] * dim_stride
    if valid is None:
        if DIM == BLOCK_DIM:
            return tl.load(at)
        else:
            return tl.load(at, mask=dims[None, :] < DIM, other=0.0)
    else:
        return tl.load(at, mask=valid[:, None] & (dims[None, :] < DIM), other=0.0)


@triton.jit
def load_tile(
    box, base, batch, head, start, rows, row_stride, dim_stride, valid, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):
    """Rows start + rows of one head: through the tensor descriptor `box` of [B, heads, tokens, D] where there is one (then
    rows that are not `valid` may hold other documents' tokens), else from `base`, the head's first row."""
    if box is None:
        return load_rows(base + start.to(tl.int64) * row_stride, rows, row_stride, dim_stride, valid, DIM, BLOCK_DIM)
    else:
        return box.load([batch, head, start, 0]).reshape(rows.shape[0], BLOCK_DIM)


@triton.jit
def head_of(base, batch, head, strides):
    return base + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[2]


@triton.jit
def without_nonfinite(x):
    """(x with inf and NaN as 0, the rows that had one): in a masked tile 0 * NaN must not reach a row that does not see
    it; the rows that do are set to NaN by their weight."""
    finite = tl.abs(x.to(tl.float32)) < float("inf")
    return tl.where(finite, x, 0.0).to(x.dtype), tl.min(finite.to(tl.int32), axis=1) == 0


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def mix32(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _chain(start, dropout, batch, head, positions):
    h = mix32(_word(dropout[0]) + start)
    h = mix32(h + _word(dropout[1]) + start)
    h = mix32(h + _word(batch) + start)
    h = mix32(h + _word(head + dropout[2]) + start)
    return mix32(h + _word(positions) + start)


@triton.jit
def _word(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def row_keys(dropout, batch, head, positions):
    """The hash's two keys of query positions (see mask.py). dropout: (seed low, seed high, head offset, k_offset,
    threshold), each a 32-bit word as int32."""
    a = _chain(tl.full((), _CHAIN_A, tl.uint32), dropout, batch, head, positions)
    return a | 1, _chain(tl.full((), _CHAIN_B, tl.uint32), dropout, batch, head, positions)


@triton.jit
def kept(dropout, a, b, j):
    """Which probabilities survive; a, b and j broadcast to the tile."""
    return mix32(a * _word(j + dropout[3]) + b) >= _word(dropout[4])
