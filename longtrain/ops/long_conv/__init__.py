"""Convolution along the token axis with filters as long as the sequence, gated (Hyena, M2-BERT, FlashButterfly).

Read `reference.py` for what is computed, `interface.py` for the public functions, `call.py` for what a call is. The backends: `cpp.py`
(with `csrc/long_conv*`), `triton.py` (with `monarch.py` and `kernels/long_conv_*`), `fft.py`. `images.py` is the same over two axes.
"""

from .fft import footprint_bytes
from .images import long_conv_2d
from .interface import explain, long_conv, long_conv_backward

__all__ = ["explain", "footprint_bytes", "long_conv", "long_conv_2d", "long_conv_backward"]
