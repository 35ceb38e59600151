"""Long convolution as it is defined, tap by tap. Plain torch, any dtype, any derivative: the oracle of the other backends.

    v = gate_in * u                y_t = gate_out_t * (sum over lags l of k_l v_{t-l}  +  skip * v_t)

v is 0 outside the token's own document.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from longtrain.ops.long_conv.call import Call, Gradients, Wanted, reach


def refuse(call: Call) -> str | None:
    """The reference serves every call."""
    return None


def forward(call: Call) -> Tensor:
    wide, taps = call.wide, call.k_HW.shape[1]
    v_BTE = call.u_BTE.to(wide)
    if call.gate_in_BTE is not None:
        v_BTE = v_BTE * call.gate_in_BTE
    k_EW = call.k_HW.to(wide).repeat_interleave(call.share, dim=0)
    parts = [v_BTE[:, :0] * k_EW.sum()]  # no document has tokens: empty, and connected to the inputs
    for document in call.documents:
        v_BNE = v_BTE[:, document]
        length = v_BNE.shape[1]
        y_BNE = torch.zeros_like(v_BNE)
        past, future = reach(taps, length, call.causal)
        for lag in range(-future, past):
            # y_t += k_lag v_{t-lag}
            meets = v_BNE[:, max(0, -lag): length - max(0, lag)]
            y_BNE = y_BNE + torch.nn.functional.pad(meets * k_EW[:, lag % taps], (0, 0, max(0, lag), max(0, -lag)))
        parts.append(y_BNE)
    y_BTE = torch.cat(parts, dim=1)
    if call.skip_E is not None:
        y_BTE = y_BTE + call.skip_E * v_BTE
    if call.gate_out_BTE is not None:
        y_BTE = y_BTE * call.gate_out_BTE
    return y_BTE.to(call.u_BTE.dtype)


def backward(call: Call, dy_BTE: Tensor, wanted: Wanted) -> Gradients:
    """By autograd."""
    skip_E = None if call.skip_E is None else call.skip_E.to(call.wide)
    tensors = {"u": call.u_BTE, "k": call.k_HW.to(call.wide), "skip": skip_E, "gate_in": call.gate_in_BTE, "gate_out": call.gate_out_BTE}
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items() if getattr(wanted, name)}
    u, k, skip, gate_in, gate_out = (leaves.get(name, x) for name, x in tensors.items())
    with torch.enable_grad():
        y_BTE = forward(replace(call, u_BTE=u, k_HW=k, skip_E=skip, gate_in_BTE=gate_in, gate_out_BTE=gate_out))
    found = dict(zip(leaves, torch.autograd.grad(y_BTE, list(leaves.values()), dy_BTE)))
    return Gradients(du_BTE=found.get("u"), dk_HW=found.get("k"), dskip_E=found.get("skip"), dgate_in_BTE=found.get("gate_in"),
                     dgate_out_BTE=found.get("gate_out"))
