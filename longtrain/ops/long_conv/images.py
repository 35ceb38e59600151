"""Long convolution over the two axes of an image: the same op on the image's rows laid behind one another.

With rows padded to a width P that no filter reaches across, the tap at (dy, dx) is lag P dy + dx of one long sequence (Kronecker
substitution), so every backend, gate and gradient serves images too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from longtrain.ops.long_conv.call import reach, wrong
from longtrain.ops.long_conv.interface import long_conv


def long_conv_2d(
    u: Tensor, k: Tensor, skip: Tensor | None = None, gate_in: Tensor | None = None, gate_out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """y_ij = gate_out_ij * (sum over lags (a, b) of k_ab (gate_in * u)_{i-a, j-b}  +  skip * (gate_in * u)_ij), by channel.

        y = long_conv_2d(u_BYXE, k_EVW)

    Args:
        u, gate_in, gate_out: [B, Y, X, E].
        k: [E, V, W] or [H, V, W], two-sided on both axes in the order of FFT frequencies: `k[:, s, t]` is lag s down for s < (V+1)//2 and
            s - V (up) from there on; t along the row likewise. A filter with its centre in the middle: `torch.fft.ifftshift(k, (-2, -1))`.
        skip, backend: as in `long_conv`. Nothing wraps around: the image is padded with zeros.

    Returns:
        y [B, Y, X, E] in u's dtype.

    Raises:
        ValueError: as `long_conv`.
    """
    if not isinstance(u, Tensor) or u.dim() != 4:
        raise wrong("u", _shape(u), "4 axes [batch, rows, columns, channels]")
    if not isinstance(k, Tensor) or k.dim() != 3 or 0 in k.shape[1:]:
        raise wrong("k", _shape(k), "3 axes [filters, rows, columns] of taps")
    for name, gate in (("gate_in", gate_in), ("gate_out", gate_out)):
        if gate is not None and (not isinstance(gate, Tensor) or gate.shape != u.shape):
            raise wrong(name, _shape(gate), f"u's shape {tuple(u.shape)}")
    B, Y, X, E = u.shape
    (down, up), (right, left) = (reach(taps, max(1, length), causal=False) for taps, length in zip(k.shape[1:], (Y, X)))
    width = X + max(right - 1, left)
    furthest = max((down - 1) * width + right - 1, up * width + left)
    lags_V, lags_W = torch.arange(-up, down), torch.arange(-left, right)
    taps = k[:, lags_V % k.shape[1]][:, :, lags_W % k.shape[2]].flatten(1)
    lag_VW = lags_V[:, None] * width + lags_W
    laid = k.new_zeros(k.shape[0], 2 * furthest + 1).index_copy(1, (lag_VW.flatten() % (2 * furthest + 1)).to(k.device), taps)

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else pad(x, (0, 0, 0, width - X)).flatten(1, 2)

    y = long_conv(rows(u), laid, skip, rows(gate_in), rows(gate_out), causal=False, backend=backend)
    return y.view(B, Y, width, E)[:, :, :X]


def _shape(x) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
