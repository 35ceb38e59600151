"""The Triton kernels in `kernels/linear_attention*.py`: linear attention by chunks, forward and backward, on NVIDIA GPUs from sm_80 on.

The formulas, the pieces and what is kept from forward to backward are those of `chunked.py`; a piece's workspace is the states at its
chunks' entries, with their adjoints in the backward, and with the delta rule U, W and the inverse of each chunk's system.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longtrain.ops.launch import Launch, padded, refuse_kernels
from longtrain.ops.linear_attention.call import Call
from longtrain.ops.linear_attention.chunked import pieces_of

WIDEST = 128


def refuse(call: Call) -> str | None:
    """Why the call cannot be served, or None."""
    if (reason := refuse_kernels(call.q_BTHD.device, call.q_BTHD.dtype, call.wide)) is not None:
        return reason
    if call.q_BTHD.shape[3] > WIDEST:
        return f"{call.q_BTHD.shape[3]} key features are above {WIDEST}"
    return None


def _chunk_tokens(call: Call) -> int:
    """`chunk_size`, within what products take and what registers hold. Results do not depend on it but for their rounding."""
    by_feature = call.decay_BTHG is not None and call.decay_BTHG.shape[3] > 1
    return max(16, min(call.chunk_size, 16 if by_feature else 32))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A run of tokens of a call: every tensor [B, T, H, ...] and number that a kernel may take, by its name there."""

    grid: tuple[int, int]
    """H, B."""
    named: dict[str, Any]

    @property
    def chunks(self) -> int:
        return self.named["chunks"]

    @property
    def value_tiles(self) -> int:
        return -(-self.named["VALUE_DIM"] // self.named["BLOCK_VALUE"])

    def launch(self, kernel: Any, first_axis: int, warps: int = 4, **others: Any) -> Launch:
        named = self.named | others
        strides = {f"{name}_strides": x.stride() for name, x in named.items() if isinstance(x, Tensor)}
        named = dict.fromkeys(kernel.arg_names) | strides | named
        warps = 8 if named["FEATURES"] == 2 else warps
        return Launch(kernel=kernel, grid=(first_axis, *self.grid), arguments={name: named[name] for name in kernel.arg_names}, warps=warps)


def _piece(call: Call, marked_BTHG: Tensor | None, tokens: slice) -> _Piece:
    B, _, H, D = call.q_BTHD.shape
    V, T, chunk = call.v_BTHV.shape[3], tokens.stop - tokens.start, _chunk_tokens(call)
    chunks = -(-T // chunk)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=call.q_BTHD.device)

    tensors = {"q": call.q_BTHD, "k": call.k_BTHD, "v": call.v_BTHV, "g": marked_BTHG, "beta": call.beta_BTH}
    named = {name: None if x is None else x[:, tokens] for name, x in tensors.items()}
    named |= {"states": empty(B, H, chunks, D, V), "u": named["v"], "w": None, "x": None}
    if call.beta_BTH is not None:
        named |= {"u": empty(B, T, H, V), "w": empty(B, T, H, D), "x": empty(B, H, T, chunk)}
    return _Piece(grid=(H, B), named=named | {
        "tokens": T, "chunks": chunks, "scale": call.scale, "DIM": D, "VALUE_DIM": V, "BLOCK_DIM": padded(D),
        "BLOCK_VALUE": min(64 if D <= 64 else 32, padded(V)), "CHUNK": chunk, "LEVELS": chunk.bit_length() - 1,
        "FEATURES": 0 if marked_BTHG is None else 1 if marked_BTHG.shape[3] == 1 else 2, "TRANSPOSED": False,
        # Of float32 three tf32 products are as exact as its own; numbers of 16 bits are whole in one.
        "PRECISION": "tf32x3" if call.q_BTHD.dtype == torch.float32 else "tf32",
    })


def _pass_on(piece: _Piece, state_BHDV: Tensor) -> Iterator[Launch]:
    """The states at the chunks' entries and U; the state goes from the first entry's to the last exit's."""
    from longtrain.kernels import linear_attention as kernels

    if piece.named["beta"] is not None:
        yield piece.launch(kernels.linear_system, piece.chunks)
    yield piece.launch(kernels.linear_states, piece.value_tiles, state=state_BHDV)


def forward_launches(call: Call, out_BTHV: Tensor, state_BHDV: Tensor, entries_BPHDV: Tensor) -> Iterator[Launch]:
    from longtrain.kernels import linear_attention as kernels

    marked = call.marked_decay()
    for p, tokens in enumerate(pieces_of(call)):
        entries_BPHDV[:, p] = state_BHDV
        piece = _piece(call, marked, tokens)
        yield from _pass_on(piece, state_BHDV)
        yield piece.launch(kernels.linear_out, piece.chunks * piece.value_tiles, out=out_BTHV[:, tokens])


def backward_launches(
    call: Call, entries_BPHDV: Tensor, dout_BTHV: Tensor, dstate_BHDV: Tensor, grads: list[Tensor | None]
) -> Iterator[Launch]:
    """dstate goes from the last state's gradient to the initial one's."""
    from longtrain.kernels import linear_attention as kernels

    marked = call.marked_decay()
    for p, tokens in reversed(list(enumerate(pieces_of(call)))):
        piece = _piece(call, marked, tokens)
        yield from _pass_on(piece, entries_BPHDV[:, p].clone(memory_format=torch.contiguous_format))
        dout = dout_BTHV[:, tokens]
        du, dexits = torch.empty_like(dout, dtype=torch.float32), torch.empty_like(piece.named["states"])
        yield piece.launch(kernels.linear_out, piece.chunks * piece.value_tiles, u=dout, out=du, TRANSPOSED=True)
        yield piece.launch(kernels.linear_d_states, piece.value_tiles, dout=dout, du=du, dstate=dstate_BHDV, dexits=dexits)
        named = {name: None if x is None else x[:, tokens] for name, x in zip(("dq", "dk", "dv", "dg", "dbeta"), grads, strict=True)}
        # Few values at a time: products in three parts of wider tiles do not fit into registers.
        yield piece.launch(kernels.linear_grads, piece.chunks, warps=8, BLOCK_VALUE=16, dout=dout, du=du, dexits=dexits, **named)


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked.forward`."""
    (B, T, H, D), V, device = call.q_BTHD.shape, call.v_BTHV.shape[3], call.q_BTHD.device
    out_BTHV = torch.empty(B, T, H, V, dtype=call.q_BTHD.dtype, device=device)
    entries_BPHDV = torch.empty(B, len(pieces_of(call)), H, D, V, dtype=call.wide, device=device)
    state_BHDV = torch.zeros(B, H, D, V, dtype=call.wide, device=device) if call.state_BHDV is None else call.state_BHDV.to(
        call.wide, copy=True, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(out_BTHV):
        for launch in forward_launches(call, out_BTHV, state_BHDV, entries_BPHDV):
            launch.run()
    return out_BTHV, state_BHDV, entries_BPHDV


def backward(call: Call, entries_BPHDV: Tensor, dout_BTHV: Tensor, dstate_BHDV: Tensor | None) -> list[Tensor | None]:
    """As `chunked.backward`."""
    inputs = (call.q_BTHD, call.k_BTHD, call.v_BTHV, call.decay_BTHG, call.beta_BTH)
    grads = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    B, _, H, D = call.q_BTHD.shape
    shape = (B, H, D, call.v_BTHV.shape[3])
    dstate = torch.zeros(shape, dtype=call.wide, device=dout_BTHV.device) if dstate_BHDV is None else dstate_BHDV.to(
        call.wide, copy=True, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(dout_BTHV):
        for launch in backward_launches(call, entries_BPHDV, dout_BTHV, dstate, grads):
            launch.run()
    return [*grads, dstate if call.state_BHDV is None else dstate.to(call.state_BHDV.dtype)]
