"""Filters as long as the sequence: every tap a parameter, or made from the lag by a small network. Axes: E channels, W taps.

    y = k * u          k = dropout(squash(smooth(taps)))

Squash and smooth keep a filter of free taps simple (Fu et al. 2023, arXiv:2302.06646, section 3.2). Two-sided filters are laid out in
the order of FFT frequencies, as `longtrain.ops.long_conv` takes them.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_SQUASH = 2.0
"""Deviations of the initial taps. Beyond it 95% of them begin at zero, where they get no gradient."""


def squash(k_EW: Tensor, amount: float) -> Tensor:
    """``sign(k) max(|k| - amount, 0)``: a soft threshold in time. A tap that is zero gets no gradient."""
    return F.softshrink(k_EW, amount) if amount else k_EW


def smooth(k_EW: Tensor, width: int, *, causal: bool) -> Tensor:
    """Mean over `width` (odd) neighbouring lags; beyond the filter's ends there are zeros."""
    if width == 1:
        return k_EW
    by_lag = k_EW if causal else torch.fft.fftshift(k_EW, -1)
    by_lag = F.avg_pool1d(by_lag[None], width, stride=1, padding=width // 2)[0]
    return by_lag if causal else torch.fft.ifftshift(by_lag, -1)


def distances(taps: int, *, causal: bool) -> Tensor:
    """``[W]`` int64: how many tokens away each tap looks."""
    lags = torch.arange(taps)
    return lags if causal else torch.minimum(lags, taps - lags)


def decay_lengths(channels: int, longest: int) -> Tensor:
    """``[E]``: tokens after which a channel's filter has decayed by e, from 1 to `longest`, evenly in their logarithm."""
    return torch.logspace(0, math.log10(max(longest, 1)), channels, dtype=torch.float64)


def initial_deviation(taps: int) -> float:
    """Of the taps of a `TapFilter` that is told nothing else: a short filter must be heard beside the skip, or its gates learn nothing."""
    return max(0.02, 0.5 * taps**-0.5)


def _magnitude(k_EW: Tensor, layer: int) -> float:
    """Sum of the taps' sizes (a device synchronisation on a GPU; 1 where there are no values, as in `torch.compile`). Raises ValueError
    where it is not finite."""
    if torch.compiler.is_compiling() or k_EW.is_meta:
        return 1.0
    total = float(k_EW.detach().abs().sum(dtype=torch.promote_types(k_EW.dtype, torch.float32)))
    if not math.isfinite(total):
        raise ValueError(f"the filter of convolution layer {layer} has taps that are not finite; lower the learning rate of filters")
    return total


class TapFilter(nn.Module):
    """A filter ``[E, W]`` with every tap a parameter. State: ``taps [E, W]``.

    `init`: "decay" draws taps of deviation ``init_std exp(-distance / length_e)`` with lengths from 1 to W over the channels,
    "normal" of `init_std` everywhere, by default `initial_deviation`. `squash`, `smooth`: see the functions; 0 and 1 do nothing.
    `dropout`: share of the taps that are zero in a training step (of the others' size nothing changes on average); it follows from the
    seed that is passed.

    Raises ValueError for a squash that leaves nothing to train.
    """

    def __init__(
        self,
        channels: int,
        taps: int,
        *,
        causal: bool = True,
        init: str = "decay",
        init_std: float | None = None,
        squash: float = 0.003,
        smooth: int = 1,
        dropout: float = 0.0,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        if channels < 1 or taps < 1:
            raise ValueError(f"a filter needs channels and taps of at least 1, found {channels} and {taps}")
        if init not in ("decay", "normal"):
            raise ValueError(f"init must be decay or normal, found {init!r}")
        init_std = initial_deviation(taps) if init_std is None else init_std
        if not init_std > 0:
            raise ValueError(f"init_std must be above 0, found {init_std!r}: a filter of zeros gets no gradient from squash")
        if not 0 <= squash <= LARGEST_SQUASH * init_std:
            raise ValueError(
                f"squash must be from 0 to {LARGEST_SQUASH:g} x init_std = {LARGEST_SQUASH * init_std:g}, found {squash!r}: nearly "
                f"every tap would be zero from the start and never train; give about {0.15 * init_std:g}, or raise init_std"
            )
        if smooth < 1 or smooth % 2 == 0:
            raise ValueError(f"smooth must be an odd number of taps, 1 for none, found {smooth!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"filter dropout must be in [0, 1), found {dropout!r}")
        self.causal, self.init, self.init_std, self.layer_index = causal, init, init_std, layer_index
        self.squash, self.smooth, self.dropout = squash, smooth, dropout
        self.taps = nn.Parameter(torch.empty(channels, taps))
        self._warned = False
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the taps. Raises ValueError where squash leaves none of them."""
        channels, taps = self.taps.shape
        self.taps.normal_(std=self.init_std)
        if self.init == "decay":
            away = distances(taps, causal=self.causal).to(self.taps.device, torch.float64)
            self.taps *= torch.exp(-away / decay_lengths(channels, taps).to(self.taps.device)[:, None]).to(self.taps.dtype)
        if self.taps.device.type != "meta" and not squash(smooth(self.taps, self.smooth, causal=self.causal), self.squash).any():
            raise ValueError(
                f"squash {self.squash:g} with smooth {self.smooth} leaves no tap of a filter initialised with deviation {self.init_std:g}, "
                "and zeros get no gradient; lower squash or smooth, or raise init_std"
            )

    def forward(self, seed: int | None = None) -> Tensor:
        """The filter ``[E, W]``. Raises ValueError for taps that are not finite, naming the layer; warns once where squash left none (but
        not where `torch.compile` runs it, which has no values to look at: there the op itself refuses such taps on a CPU)."""
        k_EW = squash(smooth(self.taps, self.smooth, causal=self.causal), self.squash)
        if _magnitude(k_EW, self.layer_index) == 0 and self.squash and not self._warned:
            self._warned = True
            warnings.warn(
                f"the filter of convolution layer {self.layer_index} is zero everywhere after squash {self.squash:g} (it was initialised "
                f"with deviation {self.init_std:g}) and gets no gradient; lower squash",
                stacklevel=2,
            )
        if self.training and self.dropout:
            if seed is None:
                raise ValueError("filter dropout is on and no seed was given: pass the step's dropout_seed")
            generator = torch.Generator(k_EW.device).manual_seed(seed % 2**63)
            kept_EW = torch.rand(k_EW.shape, generator=generator, device=k_EW.device) >= self.dropout
            k_EW = k_EW * kept_EW / (1 - self.dropout)
        return k_EW

    def extra_repr(self) -> str:
        channels, taps = self.taps.shape
        return f"{channels}, {taps}, causal={self.causal}, squash={self.squash:g}, smooth={self.smooth}, dropout={self.dropout:g}"


def _uniform(inputs: int, *shape: int) -> Tensor:
    return torch.empty(shape).uniform_(-(inputs**-0.5), inputs**-0.5)


class ImplicitFilter(nn.Module):
    """A filter made from the lag by a small network (Hyena, Poli et al. 2023, arXiv:2302.10866, section 3.3): few parameters, any length.

        k_e(t) = window_e(t) net(t)_e         window_e(t) = (exp(-t / length_e) + floor) / sqrt(length_e)
        net(t) = C sin(w2 (B sin(w1 (A [t / L, cos(2 pi f t / L), sin(2 pi f t / L)]))))        f = 1 .. bands

    L is `max_tokens`, so what a lag weighs does not depend on the sequence; tokens that far apart and farther do not see each other.
    Lengths go from 1 to L / 2 over the channels. Two-sided filters have a network output for the past and one for the future, as in
    M2-BERT. What is made of lags is float32 at least: in 16 bits one lag would be the next.
    """

    def __init__(
        self,
        channels: int,
        max_tokens: int,
        *,
        causal: bool = True,
        width: int = 32,
        bands: int = 8,
        frequency: float = 8.0,
        floor: float = 0.02,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        if channels < 1 or max_tokens < 1:
            raise ValueError(f"a filter needs channels and max_tokens of at least 1, found {channels} and {max_tokens}")
        self.channels, self.max_tokens, self.causal, self.layer_index = channels, max_tokens, causal, layer_index
        self.bands, self.floor = bands, floor
        # No nn.Linear: models draw those anew, all with one deviation, and a sine network lives by its own.
        self.inner = nn.ParameterList(_uniform(inputs, width, inputs) for inputs in (2 * bands + 1, width))
        self.biases = nn.ParameterList(_uniform(inputs, width) for inputs in (2 * bands + 1, width))
        self.frequencies = nn.Parameter(torch.full((2, width), frequency))
        self.outer = nn.Parameter(torch.randn(channels * (1 if causal else 2), width) * width**-0.5)

    def forward(self, tokens: int | None = None) -> Tensor:
        """The taps that `tokens` (`max_tokens` by default, and at most) can use: ``[E, tokens]``, two-sided ``[E, 2 tokens - 1]``."""
        tokens = self.max_tokens if tokens is None else min(tokens, self.max_tokens)
        weight = self.outer
        wide = torch.promote_types(weight.dtype, torch.float32)
        lag = torch.arange(tokens, dtype=torch.float64, device=weight.device)
        phase = 2 * math.pi / self.max_tokens * lag[:, None] * torch.arange(1, self.bands + 1, device=weight.device)
        x = torch.cat([lag[:, None] / self.max_tokens, phase.cos(), phase.sin()], dim=1).to(wide)
        with torch.autocast(weight.device.type, enabled=False):
            for inner, bias, frequency in zip(self.inner, self.biases, self.frequencies, strict=True):
                x = torch.sin(frequency.to(wide) * F.linear(x, inner.to(wide), bias.to(wide)))
        x = x.to(weight.dtype)
        length = decay_lengths(self.channels, self.max_tokens // 2).to(weight.device)
        window_WE = ((torch.exp(-lag[:, None] / length) + self.floor) * length.rsqrt()).to(weight.dtype)
        past_WE, *future = (side * window_WE for side in F.linear(x, self.outer).split(self.channels, dim=1))
        k_EW = torch.cat([past_WE, *(side[1:].flip(0) for side in future)]).T
        _magnitude(k_EW, self.layer_index)
        return k_EW

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.max_tokens}, causal={self.causal}"
