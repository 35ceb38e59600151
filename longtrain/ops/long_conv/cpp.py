"""The C++ kernels in `csrc/long_conv*`: a few channels at a time, transform, product and inverse in cache, all cores on one sequence.

Filters of some ten taps are applied directly; those much shorter than the sequence in overlapping pieces (overlap-save); the rest
whole: whichever is estimated to be fastest (`csrc/long_conv_plan.h`). Results are bitwise the same for any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtrain._extension import MISSING
from longtrain.ops.long_conv.call import Call, Gradients, Wanted


def refuse(call: Call) -> str | None:
    """Why the call cannot be served, or None."""
    if MISSING is not None:
        return MISSING
    if not hasattr(torch.ops.longtrain, "_long_conv_forward"):
        return "the C++ extension is older than this package; build it again: `pip install -e . --no-build-isolation`"
    if call.u_BTE.device.type != "cpu":
        return f"CPU kernels: the tensors are on {call.u_BTE.device.type}"
    for name, gate in (("gate_in", call.gate_in_BTE), ("gate_out", call.gate_out_BTE)):
        if gate is not None and gate.dtype != call.u_BTE.dtype:
            return f"{name} is {gate.dtype}, u {call.u_BTE.dtype}"
    if (call.wide == torch.float64) != (call.u_BTE.dtype == torch.float64):
        return f"float64 arithmetic for u in {call.u_BTE.dtype}"
    return None


def instruction_sets() -> list[str]:
    """Those of this build that this processor runs, best first."""
    return torch.ops.longtrain._long_conv_instruction_sets()


def _dense(x: Tensor | None) -> Tensor | None:
    """Channels of a token side by side; tokens and rows of the batch may lie anywhere."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _inputs(call: Call) -> tuple[Tensor | None, ...]:
    skip = None if call.skip_E is None else call.skip_E.to(call.wide).contiguous()
    return _dense(call.u_BTE), _dense(call.k_HW), skip, _dense(call.gate_in_BTE), _dense(call.gate_out_BTE)


def forward(call: Call, out_BTE: Tensor | None = None, instruction_set: str = "", method: str = "") -> Tensor:
    """y [B, T, E] in u's dtype, in `out_BTE` where given. `method`: "direct", "pieces" or "whole" instead of the cheapest; for tests."""
    y_BTE = torch.empty(call.u_BTE.shape, dtype=call.u_BTE.dtype) if out_BTE is None else out_BTE
    written = _dense(y_BTE)
    torch.ops.longtrain._long_conv_forward(*_inputs(call), call.edges, call.causal, written, instruction_set, method)
    return y_BTE if written is y_BTE else y_BTE.copy_(written)


def backward(
    call: Call, dy_BTE: Tensor, wanted: Wanted, into: Gradients | None = None, instruction_set: str = "", method: str = ""
) -> Gradients:
    """The wanted gradients, in the tensors of `into` where given."""
    if into is None:
        into = _empty(call, wanted)
    out = [getattr(into, name) for name in into.__slots__]
    written = [_dense(x) for x in out]
    torch.ops.longtrain._long_conv_backward(_dense(dy_BTE), *_inputs(call), call.edges, call.causal, *written, instruction_set, method)
    for x, found in zip(out, written):
        if found is not x:
            x.copy_(found)
    return into


def _empty(call: Call, wanted: Wanted) -> Gradients:
    def empty(want: bool, shape, dtype: torch.dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype) if want else None

    shape, dtype = call.u_BTE.shape, call.u_BTE.dtype
    return Gradients(
        du_BTE=empty(wanted.u, shape, dtype), dk_HW=empty(wanted.k, call.k_HW.shape, call.wide),
        dskip_E=empty(wanted.skip, shape[2:], call.wide), dgate_in_BTE=empty(wanted.gate_in, shape, dtype),
        dgate_out_BTE=empty(wanted.gate_out, shape, dtype),
    )
