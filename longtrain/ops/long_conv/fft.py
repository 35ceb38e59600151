"""Long convolution by torch.fft, a block of channels at a time. Saves the inputs only; the backward transforms them again.

With F the real transform of size n >= length + longest lag, so that what wraps around meets zeros, and g = gate_out * dy:

    y  = gate_out (F^-1(F v F k) + skip v)         dgate_out = dy (F^-1(F v F k) + skip v)
    dv = F^-1(F g conj(F k)) + skip g              du = dv gate_in,   dgate_in = dv u
    dk = sum over batch and documents of F^-1(F g conj(F v)), at the filter's lags              dskip = sum of g v

(The correlation theorem; FlashFFTConv, arXiv:2311.05908, appendix on backward, recomputes the same way.) Channels are transposed
block by block into zero-padded rows, so that one transform is contiguous and the workspace does not grow with E.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fft import irfft, rfft

from .call import Call, reach

# Bytes of one padded block [B, channels, n]: it and its few companions should stay in the last-level cache of a CPU.
BLOCK_BYTES_CPU, BLOCK_BYTES_GPU = 4 << 20, 256 << 20


def refuse(call: Call) -> str | None:
    """torch.fft serves every call."""
    return None


def run(call: Call) -> Tensor:
    return _LongConv.apply(call.u_BTE, call.k_EW, call.skip_E, call.gate_in_BTE, call.gate_out_BTE, call)


def transform_size(length: int, past: int, future: int) -> int:
    """Smallest even 2^a 3^b 5^c (b + c <= 1) that keeps `length` tokens apart from their wrapped-around copies."""
    needed = length + max(past - 1, future)
    sizes = []
    for size in (2, 6, 10):
        while size < needed:
            size *= 2
        sizes.append(size)
    return min(sizes)


def footprint_bytes(batch: int, length: int, width: int, taps: int, *, causal: bool = True, device: str = "cpu", threads: int = 1) -> int:
    """Workspace of one block in the backward, the larger pass: three padded blocks and three spectra."""
    size = transform_size(length, *reach(taps, length, causal))
    return 6 * _block_channels(batch, size, width, 4, device, threads) * batch * size * 4


def _block_channels(batch: int, size: int, width: int, itemsize: int, device: str, threads: int) -> int:
    budget = BLOCK_BYTES_CPU if device == "cpu" else BLOCK_BYTES_GPU
    return max(1, min(width, max(threads, budget // (max(1, batch) * size * itemsize))))


def _blocks(call: Call, size: int) -> list[slice]:
    batch, _, width = call.u_BTE.shape
    threads = torch.get_num_threads() if call.u_BTE.device.type == "cpu" else 1
    step = _block_channels(batch, size, width, call.wide.itemsize, call.u_BTE.device.type, threads)
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


def _rows(x_BTE: Tensor, document: slice, channels: slice, wide: torch.dtype) -> Tensor:
    """[B, e, length], a strided view, widened where it is narrow."""
    return x_BTE[:, document, channels].transpose(1, 2).to(wide)


def _padded(rows_BeN: Tensor, gate_BeN: Tensor | None, size: int) -> Tensor:
    """Rows times gate, contiguous, zeros up to `size`."""
    batch, width, length = rows_BeN.shape
    out = rows_BeN.new_empty(batch, width, size)
    out[..., length:] = 0
    if gate_BeN is None:
        out[..., :length] = rows_BeN
    else:
        torch.mul(rows_BeN, gate_BeN, out=out[..., :length])
    return out


def _filter_spectrum(k_EW: Tensor, channels: slice, past: int, future: int, size: int, wide: torch.dtype) -> Tensor:
    """Taps at their lags modulo `size`: the past from the left, the future from the right."""
    laid_en = torch.zeros(channels.stop - channels.start, size, dtype=wide, device=k_EW.device)
    laid_en[:, :past] = k_EW[channels, :past]
    if future:
        laid_en[:, size - future:] = k_EW[channels, k_EW.shape[1] - future:]
    return rfft(laid_en)


class _LongConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u_BTE, k_EW, skip_E, gate_in_BTE, gate_out_BTE, call):
        ctx.save_for_backward(u_BTE, k_EW, skip_E, gate_in_BTE, gate_out_BTE)
        ctx.call_edges, ctx.causal, wide = call.edges, call.causal, call.wide
        y_BTE = torch.empty(u_BTE.shape, dtype=u_BTE.dtype, device=u_BTE.device)
        for document in call.documents:
            length = document.stop - document.start
            past, future = reach(k_EW.shape[1], length, call.causal)
            size = transform_size(length, past, future)
            for channels in _blocks(call, size):
                gate = None if gate_in_BTE is None else _rows(gate_in_BTE, document, channels, wide)
                v_Ben = _padded(_rows(u_BTE, document, channels, wide), gate, size)
                y_BeN = _convolved(v_Ben, _filter_spectrum(k_EW, channels, past, future, size, wide), skip_E, channels, length)
                if gate_out_BTE is not None:
                    y_BeN.mul_(_rows(gate_out_BTE, document, channels, wide))
                y_BTE[:, document, channels] = y_BeN.transpose(1, 2)
        return y_BTE

    @staticmethod
    def backward(ctx, dy_BTE):
        if torch.is_grad_enabled():
            raise RuntimeError("long_conv: the fft backend has no second derivatives (create_graph=True); backend='reference' has them")
        u_BTE, k_EW, skip_E, gate_in_BTE, gate_out_BTE = ctx.saved_tensors
        want_u, want_k, want_skip, want_in, want_out = ctx.needs_input_grad[:5]
        call = Call(u_BTE=u_BTE, k_EW=k_EW, skip_E=skip_E, gate_in_BTE=gate_in_BTE, gate_out_BTE=gate_out_BTE, causal=ctx.causal,
                    edges=ctx.call_edges)
        wide = call.wide
        du_BTE = torch.empty_like(u_BTE) if want_u else None
        din_BTE = torch.empty_like(gate_in_BTE) if want_in else None
        dout_BTE = torch.empty_like(gate_out_BTE) if want_out else None
        dk_EW = torch.zeros(k_EW.shape, dtype=wide, device=k_EW.device) if want_k else None
        dskip_E = torch.zeros(skip_E.shape, dtype=wide, device=skip_E.device) if want_skip else None
        for document in call.documents:
            length = document.stop - document.start
            past, future = reach(k_EW.shape[1], length, call.causal)
            size = transform_size(length, past, future)
            for channels in _blocks(call, size):
                u_BeN = _rows(u_BTE, document, channels, wide)
                gate_in = None if gate_in_BTE is None else _rows(gate_in_BTE, document, channels, wide)
                dy_BeN = _rows(dy_BTE, document, channels, wide)
                spectrum_k = _filter_spectrum(k_EW, channels, past, future, size, wide)
                v_Ben = _padded(u_BeN, gate_in, size)
                gate_out = None if gate_out_BTE is None else _rows(gate_out_BTE, document, channels, wide)
                if want_out:
                    y_BeN = _convolved(v_Ben, spectrum_k, skip_E, channels, length)
                    dout_BTE[:, document, channels] = y_BeN.mul_(dy_BeN).transpose(1, 2)
                    del y_BeN
                g_Ben = _padded(dy_BeN, gate_out, size)
                spectrum_g = rfft(g_Ben)
                if want_skip:
                    dskip_E[channels] += (g_Ben[..., :length] * v_Ben[..., :length]).sum(dim=(0, 2))
                if want_k:
                    dk_en = irfft((spectrum_g * rfft(v_Ben).conj()).sum(dim=0), n=size)
                    dk_EW[channels, :past] += dk_en[:, :past]
                    if future:
                        dk_EW[channels, k_EW.shape[1] - future:] += dk_en[:, size - future:]
                    del dk_en
                if want_u or want_in:
                    dv_BeN = irfft(spectrum_g.mul_(spectrum_k.conj()), n=size)[..., :length]
                    if skip_E is not None:
                        dv_BeN.addcmul_(g_Ben[..., :length], skip_E[channels, None].to(wide))
                    if want_in:
                        din_BTE[:, document, channels] = (dv_BeN * u_BeN).transpose(1, 2)
                    if want_u:
                        du_BTE[:, document, channels] = (dv_BeN if gate_in is None else dv_BeN.mul_(gate_in)).transpose(1, 2)
        return du_BTE, dk_EW, dskip_E, din_BTE, dout_BTE, None


def _convolved(v_Ben: Tensor, spectrum_k: Tensor, skip_E: Tensor | None, channels: slice, length: int) -> Tensor:
    """F^-1(F v F k) + skip v, [B, e, length]."""
    y_BeN = irfft(rfft(v_Ben).mul_(spectrum_k), n=v_Ben.shape[-1])[..., :length]
    if skip_E is not None:
        y_BeN.addcmul_(v_Ben[..., :length], skip_E[channels, None].to(v_Ben.dtype))
    return y_BeN
