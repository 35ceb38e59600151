"""What stands around the Monarch kernels: tokens of [B, T, E] become rows of channels, [pieces, B, E, N], and come back.

A table says which tokens a row holds and which outputs it gives (`Piece` in longtrain/ops/long_conv/monarch.py).
"""

import triton
import triton.language as tl


@triton.jit
def _tile(x, gate, x_strides, gate_strides, batch, tokens, channels, mask):
    """x times gate of a tile [tokens, channels], float32."""
    tokens, batch = tokens.to(tl.int64), batch.to(tl.int64)
    found = tl.load(x + batch * x_strides[0] + tokens[:, None] * x_strides[1] + channels[None, :] * x_strides[2], mask=mask, other=0.0)
    found = found.to(tl.float32)
    if gate is not None:
        at = gate + batch * gate_strides[0] + tokens[:, None] * gate_strides[1] + channels[None, :] * gate_strides[2]
        found *= tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return found


@triton.jit
def _where(pieces, tiles, batches, N, WHICH: tl.constexpr, TOKENS: tl.constexpr):
    """(group of rows, row of the batch, places in a row, their tokens, which of them count) of the program."""
    group, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    piece = pieces + group // batches * 4
    places = tile * TOKENS + tl.arange(0, TOKENS)
    tokens = tl.load(piece) + places
    counts = (places < N) & (tokens >= tl.load(piece + WHICH)) & (tokens < tl.load(piece + WHICH + 1))
    return group, group % batches, places, tokens, counts


@triton.jit(do_not_specialize=["tiles", "batches", "width"])
def pack_rows(
    x, gate, rows, pieces, x_strides, gate_strides, tiles, batches, width, N, WHICH: tl.constexpr, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """rows = gate * x: the tokens that a piece holds (WHICH 0) or gives out (WHICH 2), zeros elsewhere.

    Grid: (pieces * B * tiles of N, tiles of channels).
    """
    group, batch, places, tokens, counts = _where(pieces, tiles, batches, N, WHICH, TOKENS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tile = _tile(x, gate, x_strides, gate_strides, batch, tokens, channels, counts[:, None] & (channels < width)[None, :])
    at = (group.to(tl.int64) * width + channels[:, None]) * N + places[None, :]
    tl.store(rows + at, tl.trans(tile).to(rows.dtype.element_ty), mask=(channels < width)[:, None] & (places < N)[None, :])


@triton.jit(do_not_specialize=["tiles", "batches", "width"])
def unpack_rows(
    rows, pieces, x, x_gate, skip, gate_a, gate_b, out_a, out_b, x_strides, x_gate_strides, gate_a_strides, gate_b_strides, out_a_strides,
    out_b_strides, tiles, batches, width, N, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """out_a = gate_a * (rows + skip * x_gate * x) at the tokens that pieces give out, and out_b likewise. Grid: as above."""
    group, batch, places, tokens, counts = _where(pieces, tiles, batches, N, 2, TOKENS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here = channels < width
    mask = counts[:, None] & here[None, :]
    at = (group.to(tl.int64) * width + channels[:, None]) * N + places[None, :]
    mixed = tl.trans(tl.load(rows + at, mask=here[:, None] & counts[None, :], other=0.0)).to(tl.float32)
    if skip is not None:
        mixed += tl.load(skip + channels, mask=here, other=0.0)[None, :] * _tile(
            x, x_gate, x_strides, x_gate_strides, batch, tokens, channels, mask
        )
    if out_a is not None:
        _write(out_a, mixed, gate_a, out_a_strides, gate_a_strides, batch, tokens, channels, mask)
    if out_b is not None:
        _write(out_b, mixed, gate_b, out_b_strides, gate_b_strides, batch, tokens, channels, mask)


@triton.jit
def _write(out, mixed, gate, out_strides, gate_strides, batch, tokens, channels, mask):
    tokens, batch = tokens.to(tl.int64), batch.to(tl.int64)
    if gate is not None:
        at = gate + batch * gate_strides[0] + tokens[:, None] * gate_strides[1] + channels[None, :] * gate_strides[2]
        mixed *= tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = out + batch * out_strides[0] + tokens[:, None] * out_strides[1] + channels[None, :] * out_strides[2]
    tl.store(at, mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "width"])
def skip_sums(
    u, gate_in, dy, gate_out, sums, u_strides, gate_in_strides, dy_strides, gate_out_strides, tokens, width, SPAN: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """sums [B * spans, E]: gate_in u gate_out dy, added up over SPAN tokens. Grid: (B * spans, tiles of channels)."""
    spans = tl.cdiv(tokens, SPAN)
    batch, first = tl.program_id(0) // spans, tl.program_id(0) % spans * SPAN
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((CHANNELS,), tl.float32)
    for start in tl.range(0, SPAN, TOKENS):
        at = first + start + tl.arange(0, TOKENS)
        mask = (at < tokens)[:, None] & (channels < width)[None, :]
        v = _tile(u, gate_in, u_strides, gate_in_strides, batch, at, channels, mask)
        total += tl.sum(v * _tile(dy, gate_out, dy_strides, gate_out_strides, batch, at, channels, mask), 0)
    tl.store(sums + tl.program_id(0).to(tl.int64) * width + channels, total, mask=channels < width)
