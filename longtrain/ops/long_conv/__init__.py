"""Convolution along the token axis with filters as long as the sequence, gated (Hyena, M2-BERT, FlashButterfly).

Read `reference.py` for what is computed, `interface.py` for the public functions, `call.py` for what a call is. The backends: `cpp.py`
(with `csrc/long_conv*`), `triton.py` (with `monarch.py` and `kernels/long_conv_*`), `fft.py`. `images.py` is the same over two axes.
"""

from math import log2

from longtrain.ops.long_conv.fft import footprint_bytes
from longtrain.ops.long_conv.images import long_conv_2d
from longtrain.ops.long_conv.interface import explain, long_conv, long_conv_backward

__all__ = ["direct_flops", "explain", "footprint_bytes", "long_conv", "long_conv_2d", "long_conv_backward", "transform_flops"]


def direct_flops(tokens: int, *, channels: int, taps: int, backward: bool = False) -> float:
    """Tap by tap, for a batch of one; backward for inputs and for filters."""
    return 2 * tokens * channels * min(taps, tokens) * (2 if backward else 1)


def transform_flops(tokens: int, *, channels: int, taps: int, backward: bool = False) -> float:
    """Of real transforms of N = 2 (tokens or taps, the fewer) points, 2.5 N log2 N each, in as many pieces as the tokens need: of v and y,
    and of the filter; backward of v, g, dv, of the filter and of its gradient."""
    reach = max(1, min(taps, tokens))
    pieces, one = -(-tokens // reach), 5 * reach * log2(2 * reach)
    return channels * one * (3 * pieces + 2 if backward else 2 * pieces + 1)
