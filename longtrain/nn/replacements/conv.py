"""`torch.nn.Conv1d` with filters as long as the sequence: depthwise, by `longtrain.ops.long_conv`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from longtrain.ops.long_conv import long_conv


class Conv1d(nn.Conv1d):
    """As `torch.nn.Conv1d`: same constructor and state; ``[B, E, T]`` or ``[E, T]``. For ``groups == in_channels`` alone.

    Time grows as T log T instead of T W. Raises ValueError where channels are mixed (torch's is the right one there).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.groups != self.in_channels:
            raise ValueError(
                f"groups is {self.groups} and in_channels {self.in_channels}: a long convolution does not mix channels; give "
                "groups=in_channels, or use torch.nn.Conv1d"
            )

    def forward(self, input: Tensor) -> Tensor:
        """y_t = bias + sum over taps s of w_s x_{t - left + s dilation}, torch's correlation, for every stride-th t."""
        x_BET = input if input.ndim == 3 else input[None]
        if x_BET.ndim != 3 or x_BET.shape[1] != self.in_channels:
            raise ValueError(f"input must be [B, {self.in_channels}, T] or [{self.in_channels}, T], found shape {list(input.shape)}")
        (dilation,), (stride,) = self.dilation, self.stride
        left, right = self._reversed_padding_repeated_twice
        reach = dilation * (self.kernel_size[0] - 1)
        if self.padding_mode == "zeros":
            # What comes before the first token is zero anyway: of the left padding only what lies beyond the filter's reach is laid out.
            skipped = min(left, reach)
            x_BET = F.pad(x_BET, (left - skipped, right))
        else:
            skipped = 0
            x_BET = F.pad(x_BET, (left, right), mode=self.padding_mode)
        if x_BET.shape[2] + skipped <= reach:
            raise ValueError(f"the filter reaches over {reach + 1} tokens, and there are {x_BET.shape[2] + skipped} with padding")
        # Lag l of a causal convolution is tap W - 1 - l of the correlation.
        k_EW = self.weight[:, 0].flip(-1)
        if dilation > 1:
            spread_EW = k_EW.new_zeros(k_EW.shape[0], reach + 1)
            spread_EW[:, ::dilation] = k_EW
            k_EW = spread_EW
        u_BTE = x_BET.transpose(1, 2)
        if (copies := self.out_channels // self.in_channels) > 1:
            u_BTE = u_BTE.repeat_interleave(copies, dim=2)
        y_BET = long_conv(u_BTE, k_EW).transpose(1, 2)[..., reach - skipped :: stride]
        y_BET = y_BET if self.bias is None else y_BET + self.bias[:, None]
        return y_BET if input.ndim == 3 else y_BET[0]
