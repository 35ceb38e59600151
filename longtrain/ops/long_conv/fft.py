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

from longtrain.ops.long_conv.call import Call, Gradients, Wanted, reach, wrong

# Bytes of one padded block [B, channels, n]: it and its few companions should stay in the last-level cache of a CPU.
BLOCK_BYTES_CPU, BLOCK_BYTES_GPU = 4 << 20, 256 << 20


def refuse(call: Call) -> str | None:
    """torch.fft serves every call."""
    return None


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


def _heads(call: Call, channels: slice) -> Tensor:
    return torch.arange(channels.start, channels.stop, device=call.k_HW.device) // call.share


def _filter_spectrum(call: Call, channels: slice, past: int, future: int, size: int) -> Tensor:
    """Taps at their lags modulo `size`: the past from the left, the future from the right."""
    k_eW = call.k_HW[channels] if call.share == 1 else call.k_HW[_heads(call, channels)]
    laid_en = torch.zeros(channels.stop - channels.start, size, dtype=call.wide, device=k_eW.device)
    laid_en[:, :past] = k_eW[:, :past]
    if future:
        laid_en[:, size - future:] = k_eW[:, k_eW.shape[1] - future:]
    if laid_en.device.type == "cpu" and not torch.isfinite(laid_en).all():
        row = int(torch.isfinite(laid_en).all(dim=1).logical_not().nonzero()[0])
        raise wrong("k", f"a tap in row {(channels.start + row) // call.share} that is not finite", "finite taps")
    return rfft(laid_en)


def forward(call: Call) -> Tensor:
    u_BTE, wide = call.u_BTE, call.wide
    y_BTE = torch.empty(u_BTE.shape, dtype=u_BTE.dtype, device=u_BTE.device)
    for document in call.documents:
        length = document.stop - document.start
        past, future = reach(call.k_HW.shape[1], length, call.causal)
        size = transform_size(length, past, future)
        for channels in _blocks(call, size):
            gate = None if call.gate_in_BTE is None else _rows(call.gate_in_BTE, document, channels, wide)
            v_Ben = _padded(_rows(u_BTE, document, channels, wide), gate, size)
            y_BeN = _convolved(v_Ben, _filter_spectrum(call, channels, past, future, size), call.skip_E, channels, length)
            if call.gate_out_BTE is not None:
                y_BeN.mul_(_rows(call.gate_out_BTE, document, channels, wide))
            y_BTE[:, document, channels] = y_BeN.transpose(1, 2)
    return y_BTE


def backward(call: Call, dy_BTE: Tensor, wanted: Wanted) -> Gradients:
    u_BTE, k_HW, skip_E, wide = call.u_BTE, call.k_HW, call.skip_E, call.wide
    # Contiguous whatever the inputs are, as the op's fake kernel says.
    du_BTE = u_BTE.new_empty(u_BTE.shape) if wanted.u else None
    din_BTE = call.gate_in_BTE.new_empty(u_BTE.shape) if wanted.gate_in else None
    dout_BTE = call.gate_out_BTE.new_empty(u_BTE.shape) if wanted.gate_out else None
    dk_HW = torch.zeros(k_HW.shape, dtype=wide, device=k_HW.device) if wanted.k else None
    dskip_E = torch.zeros(skip_E.shape, dtype=wide, device=skip_E.device) if wanted.skip else None
    for document in call.documents:
        length = document.stop - document.start
        past, future = reach(k_HW.shape[1], length, call.causal)
        size = transform_size(length, past, future)
        for channels in _blocks(call, size):
            u_BeN = _rows(u_BTE, document, channels, wide)
            gate_in = None if call.gate_in_BTE is None else _rows(call.gate_in_BTE, document, channels, wide)
            dy_BeN = _rows(dy_BTE, document, channels, wide)
            spectrum_k = _filter_spectrum(call, channels, past, future, size)
            v_Ben = _padded(u_BeN, gate_in, size)
            gate_out = None if call.gate_out_BTE is None else _rows(call.gate_out_BTE, document, channels, wide)
            if wanted.gate_out:
                y_BeN = _convolved(v_Ben, spectrum_k, skip_E, channels, length)
                dout_BTE[:, document, channels] = y_BeN.mul_(dy_BeN).transpose(1, 2)
                del y_BeN
            g_Ben = _padded(dy_BeN, gate_out, size)
            spectrum_g = rfft(g_Ben)
            if wanted.skip:
                dskip_E[channels] += (g_Ben[..., :length] * v_Ben[..., :length]).sum(dim=(0, 2))
            if wanted.k:
                dk_en = irfft((spectrum_g * rfft(v_Ben).conj()).sum(dim=0), n=size)
                heads = _heads(call, channels)
                dk_HW[:, :past].index_add_(0, heads, dk_en[:, :past])
                if future:
                    dk_HW[:, k_HW.shape[1] - future:].index_add_(0, heads, dk_en[:, size - future:])
                del dk_en
            if wanted.u or wanted.gate_in:
                dv_BeN = irfft(spectrum_g.mul_(spectrum_k.conj()), n=size)[..., :length]
                if skip_E is not None:
                    dv_BeN.addcmul_(g_Ben[..., :length], skip_E[channels, None].to(wide))
                if wanted.gate_in:
                    din_BTE[:, document, channels] = (dv_BeN * u_BeN).transpose(1, 2)
                if wanted.u:
                    du_BTE[:, document, channels] = (dv_BeN if gate_in is None else dv_BeN.mul_(gate_in)).transpose(1, 2)
    return Gradients(du_BTE=du_BTE, dk_HW=dk_HW, dskip_E=dskip_E, dgate_in_BTE=din_BTE, dgate_out_BTE=dout_BTE)


def _convolved(v_Ben: Tensor, spectrum_k: Tensor, skip_E: Tensor | None, channels: slice, length: int) -> Tensor:
    """F^-1(F v F k) + skip v, [B, e, length]."""
    y_BeN = irfft(rfft(v_Ben).mul_(spectrum_k), n=v_Ben.shape[-1])[..., :length]
    if skip_E is not None:
        y_BeN.addcmul_(v_Ben[..., :length], skip_E[channels, None].to(v_Ben.dtype))
    return y_BeN
