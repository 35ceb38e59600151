"""The public functions, and the torch custom ops under them (autograd, fake kernels).

What needs no tensor values is checked here, so that `torch.compile` sees the checks as guards; boundaries of documents are read and
checked inside the ops, which are opaque to it.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from . import cpp, fft, reference
from .call import Call, Wanted, build_call, check_tensors, wrong

BACKENDS: dict[str, Any] = {"cpp": cpp, "fft": fft, "reference": reference}
"""In order of preference of backend="auto": modules with `refuse(call)` -> why not, or None; `forward(call)` -> y; `backward(call, dy,
wanted)` -> Gradients. The reference has no backward: it is differentiated by autograd, as often as one likes."""


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

    Args:
        u, gate_in, gate_out: [B, T, E], float64, float32, bfloat16 or float16.
        k: [E, W], any W; taps that reach past a document's ends meet zeros. Or [H, W], H a divisor of E: each filter serves E / H
            consecutive channels (a head). Taps that meet tokens must be finite (on a GPU this is not checked).
        skip: [E].
        causal: True: `k[:, s]` is lag s, for s in 0 .. W-1. False: two-sided, in the order of FFT frequencies, as users of
            FlashFFTConv and M2-BERT lay filters out: `k[:, s]` is lag s for s < (W+1)//2, and lag s - W (a token of the future) from
            there on. So M2-BERT's pair of filters is `torch.cat([k, k_rev.flip(-1)], -1)`, and a filter with its centre in the middle
            is `torch.fft.ifftshift(k, -1)`. Unlike there nothing wraps around: the sequence is padded with zeros.
        cu_seqlens: int32 or int64 [documents + 1], 0 first and T last: documents packed along T do not see each other (in every row of
            the batch the same boundaries).
        backend: "auto", or a name from `explain(...)`.

    Returns:
        y [B, T, E] in u's dtype. Arithmetic and the gradients' sums are float32 (float64 where an input is). The backward saves u, k,
        skip and the gates only. A NaN in u, a gate or y's gradient stays in its channel, document and row of the batch (and the
        gradient of its filter).

    Raises:
        ValueError: naming argument, found and expected; or a named backend's reason to refuse.
    """
    check_tensors(u, k, skip, gate_in, gate_out, causal, cu_seqlens)
    if backend == "reference":
        with torch.autocast(u.device.type, enabled=False):
            return reference.forward(build_call(u, k, skip, gate_in, gate_out, causal, cu_seqlens))
    return _forward_op(u, k, skip, gate_in, gate_out, cu_seqlens, causal, backend)


def explain(u: Tensor, k: Tensor, skip: Tensor | None = None, gate_in: Tensor | None = None, gate_out: Tensor | None = None,
            causal: bool = True, cu_seqlens: Tensor | None = None) -> dict[str, str | None]:
    """Each backend, in order of preference, and why it does not serve this call (None: it could)."""
    check_tensors(u, k, skip, gate_in, gate_out, causal, cu_seqlens)
    call = build_call(u, k, skip, gate_in, gate_out, causal, cu_seqlens)
    return {name: module.refuse(call) for name, module in BACKENDS.items()}


def _select(call: Call, backend: str) -> Any:
    if backend == "auto":
        return next(module for module in BACKENDS.values() if module.refuse(call) is None)
    if backend not in BACKENDS:
        raise wrong("backend", repr(backend), f"'auto' or one of {', '.join(map(repr, BACKENDS))}")
    reason = BACKENDS[backend].refuse(call)
    if reason is not None:
        raise wrong("backend", repr(backend), f"another one, or 'auto': it refuses this call ({reason})")
    return BACKENDS[backend]


@torch.library.custom_op("longtrain::long_conv", mutates_args=())
def _forward_op(
    u: Tensor, k: Tensor, skip: Optional[Tensor], gate_in: Optional[Tensor], gate_out: Optional[Tensor], cu_seqlens: Optional[Tensor],
    causal: bool, backend: str,
) -> Tensor:
    call = build_call(u, k, skip, gate_in, gate_out, causal, cu_seqlens)
    with torch.autocast(u.device.type, enabled=False):
        chosen = _select(call, backend)
        return chosen.forward(call) if u.numel() else u.new_empty(u.shape)


@_forward_op.register_fake
def _(u, *rest):
    return u.new_empty(u.shape)


@torch.library.custom_op("longtrain::long_conv_backward", mutates_args=())
def _backward_op(
    dy: Tensor, u: Tensor, k: Tensor, skip: Optional[Tensor], gate_in: Optional[Tensor], gate_out: Optional[Tensor],
    cu_seqlens: Optional[Tensor], causal: bool, backend: str, wanted: list[bool],
) -> list[Tensor]:
    """The wanted ones of du, dk, dskip, dgate_in, dgate_out, in this order."""
    call = build_call(u, k, skip, gate_in, gate_out, causal, cu_seqlens)
    which = Wanted(u=wanted[0], k=wanted[1], skip=wanted[2], gate_in=wanted[3], gate_out=wanted[4])
    if not u.numel():
        return [torch.zeros_like(x) for want, x in zip(wanted, (u, k, skip, gate_in, gate_out)) if want]
    with torch.autocast(u.device.type, enabled=False):
        found = _select(call, backend).backward(call, dy, which)
    pairs = ((found.du_BTE, u), (found.dk_HW, k), (found.dskip_E, skip), (found.dgate_in_BTE, gate_in), (found.dgate_out_BTE, gate_out))
    return [gradient.to(x.dtype) for want, (gradient, x) in zip(wanted, pairs) if want]


@_backward_op.register_fake
def _(dy, u, k, skip, gate_in, gate_out, cu_seqlens, causal, backend, wanted):
    return [x.new_empty(x.shape) for want, x in zip(wanted, (u, k, skip, gate_in, gate_out)) if want]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.causal, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd_backward(ctx, dy):
    if torch.is_grad_enabled():
        raise RuntimeError("long_conv: no second derivatives (create_graph=True); backend='reference' has them")
    wanted = list(ctx.needs_input_grad[:5])
    found = iter(_backward_op(dy, *ctx.saved_tensors, ctx.causal, ctx.backend, wanted))
    return (*(next(found) if want else None for want in wanted), None, None, None)


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)
