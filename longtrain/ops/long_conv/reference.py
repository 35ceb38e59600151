"""Long convolution as it is defined, tap by tap. Plain torch, any dtype, any derivative: the oracle of the other backends.

    v = gate_in * u                y_t = gate_out_t * (sum over lags l of k_l v_{t-l}  +  skip * v_t)

v is 0 outside the token's own document.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call, reach


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
