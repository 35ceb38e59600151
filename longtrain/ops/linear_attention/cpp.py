"""The C++ kernels in `csrc/linear_attention*`: chunks of 64 tokens in cache, heads over the cores; of a head that is left, every core.

The formulas, the pieces and what is kept from forward to backward are those of `chunked.py`; `chunk_size` only rounds differently and is
not looked at. A thread's workspace is some tiles, and the states (and U) of one piece; of heads that threads share it is some tiles of the
chunks of two pieces. Results are bitwise the same for any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtrain._extension import MISSING
from longtrain.ops.linear_attention.call import Call
from longtrain.ops.linear_attention.chunked import PIECE_TOKENS, pieces_of

CHUNK, WIDEST, SHARED_TOKENS = 64, 128, 256
"""Of `csrc/linear_attention_args.h` and `csrc/linear_attention.cpp`."""


def refuse(call: Call) -> str | None:
    """Why the call cannot be served, or None."""
    if not call.q_BTHD.numel() or not call.v_BTHV.numel():
        return "there is nothing to compute"
    return refuse_shape(call.q_BTHD.device.type, call.q_BTHD.shape[3], call.v_BTHV.shape[3])


def refuse_shape(device: str, key_dim: int, value_dim: int) -> str | None:
    """Why calls of such heads cannot be served, or None."""
    if MISSING is not None:
        return MISSING
    if not hasattr(torch.ops.longtrain, "_linear_attention_forward"):
        return "the C++ extension is older than this package; build it again: `pip install -e . --no-build-isolation`"
    if device != "cpu":
        return f"CPU kernels: the tensors are on {device}"
    for name, dim in (("key", key_dim), ("value", value_dim)):
        if dim > WIDEST:
            return f"{dim} {name} features are above {WIDEST}"
    return None


def footprint_bytes(tokens: int, heads: int, key_dim: int, value_dim: int, *, itemsize: int) -> int:
    """As `chunked.footprint_bytes`: the tiles of each thread, and of a piece the states and U, or of two the chunks of
    shared heads (`csrc/linear_attention_shared.h`)."""
    piece, threads = PIECE_TOKENS["cpu"], torch.get_num_threads()
    chunks = -(-min(tokens, piece) // CHUNK)
    held = chunks * min(2, -(-tokens // piece))
    wide = 64 if max(key_dim, value_dim) <= 64 else WIDEST
    shared = heads % threads if tokens >= SHARED_TOKENS else 0
    kept = 5 * CHUNK * wide + 2 * CHUNK**2 + 2 * wide**2 + CHUNK + wide
    tiles = kept + 20 * CHUNK * wide + 5 * CHUNK**2 + 2 * wide**2 + 2 * CHUNK + 2 * wide
    states = chunks * wide * (wide + CHUNK) if heads > shared else 0
    return ((threads if shared else min(threads, heads)) * (tiles + states) + shared * held * kept) * itemsize


def instruction_sets() -> list[str]:
    """Those of this build that this processor runs, best first."""
    return torch.ops.longtrain._linear_attention_instruction_sets()


def _inputs(call: Call) -> tuple:
    tokens = pieces_of(call)[0]
    return call.q_BTHD, call.k_BTHD, call.v_BTHV, call.marked_decay(), call.beta_BTH, call.scale, tokens.stop


def _state(call: Call, given: Tensor | None) -> Tensor:
    B, _, H, D = call.q_BTHD.shape
    if given is None:
        return torch.zeros(B, H, D, call.v_BTHV.shape[3], dtype=call.wide)
    return given.to(call.wide, copy=True, memory_format=torch.contiguous_format)


def forward(call: Call, instruction_set: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked.forward`."""
    state_BHDV = _state(call, call.state_BHDV)
    out_BTHV = torch.empty(call.v_BTHV.shape, dtype=call.q_BTHD.dtype)
    entries_BPHDV = state_BHDV.new_empty(state_BHDV.shape[0], len(pieces_of(call)), *state_BHDV.shape[1:])
    torch.ops.longtrain._linear_attention_forward(*_inputs(call), out_BTHV, state_BHDV, entries_BPHDV, instruction_set)
    return out_BTHV, state_BHDV, entries_BPHDV


def backward(
    call: Call, entries_BPHDV: Tensor, dout_BTHV: Tensor, dstate_BHDV: Tensor | None, instruction_set: str = ""
) -> list[Tensor | None]:
    """As `chunked.backward`."""
    inputs = (call.q_BTHD, call.k_BTHD, call.v_BTHV, call.decay_BTHG, call.beta_BTH)
    grads = [None if x is None else torch.empty(x.shape, dtype=x.dtype) for x in inputs]
    dstate = _state(call, dstate_BHDV)
    torch.ops.longtrain._linear_attention_backward(
        *_inputs(call), dout_BTHV, entries_BPHDV.contiguous(), dstate, *grads, instruction_set
    )
    return [*grads, dstate if call.state_BHDV is None else dstate.to(call.state_BHDV.dtype)]
