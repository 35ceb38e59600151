"""The public functions, and the torch custom ops under them (autograd, fake kernels).

What needs no tensor values is checked here, so that `torch.compile` sees the checks as guards; boundaries of documents are read and
checked inside the ops, which are opaque to it.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from longtrain.ops.long_conv import cpp, fft, reference, triton
from longtrain.ops.long_conv.call import Call, Gradients, Wanted, build_call, check_like, check_tensors, wrong

BACKENDS: dict[str, Any] = {"cpp": cpp, "triton": triton, "fft": fft, "reference": reference}
"""In order of preference of backend="auto": modules with `refuse(call)` -> why not, or None; `forward(call)` -> y; `backward(call, dy,
wanted)` -> Gradients. `long_conv` runs the reference outside of the ops, so that autograd differentiates it as often as one likes."""


def long_conv(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None = None,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
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
        out: [B, T, E] in u's dtype, of any strides: y is written there; without gradients, as with torch's own `out`.

    Returns:
        y [B, T, E] in u's dtype. Arithmetic and the gradients' sums are float32 (float64 where an input is); "triton" rounds the factors
        of its matrix products to u's dtype. The backward saves u, k, skip and the gates only.
        A NaN in u, a gate or y's gradient stays in its channel, document and row of the batch (and the gradient of its filter).

    Raises:
        ValueError: naming argument, found and expected; or a named backend's reason to refuse.
    """
    check_tensors(u, k, skip, gate_in, gate_out, causal, cu_seqlens)
    if out is not None:
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (u, k, skip, gate_in, gate_out, out)):
            raise wrong("out", "a tensor where gradients are wanted", "None, or a call under torch.no_grad()")
        check_like("out", out, u.shape, u.dtype, u)
        call = build_call(u, k, skip, gate_in, gate_out, causal, cu_seqlens)
        chosen = _select(call, backend)
        if u.numel():
            chosen.forward(call, out) if chosen is cpp else out.copy_(chosen.forward(call))
        return out
    if backend == "reference":
        with torch.autocast(u.device.type, enabled=False):
            return reference.forward(build_call(u, k, skip, gate_in, gate_out, causal, cu_seqlens))
    return _forward_op(u, k, skip, gate_in, gate_out, cu_seqlens, causal, backend)


def long_conv_backward(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    skip: Tensor | None = None,
    gate_in: Tensor | None = None,
    gate_out: Tensor | None = None,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    *,
    du: Tensor | None = None,
    dk: Tensor | None = None,
    dskip: Tensor | None = None,
    dgate_in: Tensor | None = None,
    dgate_out: Tensor | None = None,
) -> None:
    """Writes the gradients of `long_conv` whose tensors are given, from y's gradient dy [B, T, E]; no forward is run.

    Args:
        du, dgate_in, dgate_out: [B, T, E] in the dtype of what they are the gradient of, of any strides: a group of channels of a larger
            tensor will do.
        dk: as k, dskip: as skip; both contiguous and wide (float32, float64 where an input is).

    Raises:
        ValueError: as `long_conv`.
    """
    check_tensors(u, k, skip, gate_in, gate_out, causal, cu_seqlens)
    check_like("dy", dy, u.shape, u.dtype, u)
    call = build_call(u, k, skip, gate_in, gate_out, causal, cu_seqlens)
    pairs = dict(du=(du, u), dk=(dk, k), dskip=(dskip, skip), dgate_in=(dgate_in, gate_in), dgate_out=(dgate_out, gate_out))
    for name, (gradient, x) in pairs.items():
        if gradient is None:
            continue
        if x is None:
            raise wrong(name, "a tensor", f"None, since {name[1:]} is None")
        check_like(name, gradient, x.shape, call.wide if name in ("dk", "dskip") else x.dtype, u)
    chosen = _select(call, backend)
    given = Gradients(du_BTE=du, dk_HW=dk, dskip_E=dskip, dgate_in_BTE=dgate_in, dgate_out_BTE=dgate_out)
    wanted = Wanted(**{name[1:]: gradient is not None for name, (gradient, _) in pairs.items()})
    with torch.no_grad(), torch.autocast(u.device.type, enabled=False):
        if not u.numel():
            for gradient, _ in pairs.values():
                gradient is None or gradient.zero_()
        elif chosen is cpp:
            cpp.backward(call, dy, wanted, given)
        else:
            found = chosen.backward(call, dy, wanted)
            for name in given.__slots__:
                if getattr(given, name) is not None:
                    getattr(given, name).copy_(getattr(found, name))


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
        return [x.new_zeros(x.shape) for want, x in zip(wanted, (u, k, skip, gate_in, gate_out)) if want]
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
