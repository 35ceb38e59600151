"""Convolution along the token axis with filters as long as the sequence, gated (Hyena, M2-BERT, FlashButterfly).

Read `reference.py` for what is computed and `fft.py` for how.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fft, reference
from .call import Call, checked
from .fft import footprint_bytes

__all__ = ["explain", "footprint_bytes", "long_conv"]

# In order of preference of backend="auto".
BACKENDS = {"fft": fft, "reference": reference}


def long_conv(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None = None,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y_t = gate_out_t * (sum over lags l of k_l (gate_in * u)_{t-l}  +  skip * (gate_in * u)_t), by channel.

        y = long_conv(u_BTE, k_EW, skip_E, gate_in=x1_BTE, gate_out=x2_BTE)

    u, gate_in, gate_out: [B, T, E]. k: [E, W], any W; taps that reach past a document's ends meet zeros. skip: [E].
    causal=True: `k[:, s]` is lag s, for s in 0 .. W-1.
    causal=False: two-sided, in the order of FFT frequencies, as users of FlashFFTConv and M2-BERT lay filters out: `k[:, s]` is lag s
    for s < (W+1)//2, and lag s - W (a token of the future) from there on. So M2-BERT's pair of filters is
    `torch.cat([k, k_rev.flip(-1)], -1)`, and a filter with its centre in the middle is `torch.fft.ifftshift(k, -1)`. Unlike there
    nothing wraps around: the sequence is padded with zeros.
    cu_seqlens: int32 or int64 [documents + 1], 0 first and T last: documents packed along T do not see each other (in every row of
    the batch the same boundaries).
    backend: "auto", or one of "fft", "reference".

    Returns u's dtype; arithmetic and the gradients of k and skip are float32 at least (float64 where an input is).
    Raises ValueError for tensors that do not fit together.
    """
    call = checked(u, k, skip, gate_in, gate_out, causal, cu_seqlens)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"long_conv: backend must be auto or one of {', '.join(BACKENDS)}, not {backend!r}")
    module = next(m for m in BACKENDS.values() if m.refuse(call) is None) if backend == "auto" else BACKENDS[backend]
    reason = module.refuse(call)
    if reason is not None:
        raise ValueError(f"long_conv: backend {backend!r} cannot serve this call: {reason}; backend='auto' takes one that can")
    with torch.autocast(u.device.type, enabled=False):
        return module.run(call)


def explain(u: Tensor, k: Tensor, skip: Tensor | None = None, gate_in: Tensor | None = None, gate_out: Tensor | None = None,
            causal: bool = True, cu_seqlens: Tensor | None = None) -> dict[str, str | None]:
    """Each backend, in order of preference, and why it does not serve this call (None: it could)."""
    call: Call = checked(u, k, skip, gate_in, gate_out, causal, cu_seqlens)
    return {name: module.refuse(call) for name, module in BACKENDS.items()}
