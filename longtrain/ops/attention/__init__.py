"""Exact attention with offsets, windows, documents, sinks and LSE: one op, several backends.

Read `mask.py` (who sees whom) and `reference.py` (the mathematics) first, then `interface.py` (the public functions),
`call.py` (what a call is, checked) and `select.py` (which backend serves it). The backends: `cpp.py` (with `csrc/`),
`triton.py` (with `kernels/`), `tiled.py`, `reference.py`; and libraries, which get a call in `pieces.py`: `sdpa.py`,
`flash.py`, `cudnn.py`, `flash_attn.py`.
"""

from longtrain.ops.attention.interface import attention, attention_backward, explain
from longtrain.ops.attention.merge import merge_attention
from longtrain.ops.attention.select import Explanation

__all__ = ["Explanation", "attention", "attention_backward", "explain", "merge_attention"]
