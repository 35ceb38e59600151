"""The C++ kernels in `csrc/attention*`: every option, any CPU, all cores on one sequence.

Scores are tiled (192 x 192), bf16/fp16 tiles converted once, accumulation in float32 (float64 for float64); tiles outside
the mask are never computed; workspace is under 7 MB a thread. Results are bitwise the same for any number of threads.
"""

from __future__ import annotations

import torch

from longtrain._extension import MISSING
from longtrain.ops.attention.call import AttentionCall

MAX_HEAD_DIM = 256


def refuse(call: AttentionCall) -> str | None:
    """Why the call cannot be served, or None."""
    if MISSING is not None:
        return MISSING
    if call.device.type != "cpu":
        return f"CPU kernels: the tensors are on {call.device.type}"
    if max(call.head_dim, call.value_dim) > MAX_HEAD_DIM:
        return f"head dim {max(call.head_dim, call.value_dim)} is above {MAX_HEAD_DIM}"
    return None


def instruction_sets(dtype: torch.dtype) -> list[str]:
    """Those of this build that this processor runs for `dtype`, best first."""
    return torch.ops.longtrain._attention_instruction_sets(dtype)


def _options(call: AttentionCall, instruction_set: str) -> tuple:
    rows = [(d.q_start, d.q_stop, d.k_start, d.k_stop, d.q_shift, d.origin) for d in call.documents]
    documents = torch.tensor(rows, dtype=torch.int64).view(len(rows), 6)
    return (
        documents, call.causal, *call.window, call.k_offset, call.sink_tokens, call.block, call.stride,
        call.softcap or 0.0, call.scale, call.dropout_p, call.dropout_seed, call.head_offset, instruction_set,
    )


def forward(call: AttentionCall, q, k, v, sink_logits, instruction_set: str = ""):
    """q [B, T, H, D], k [B, S, K, D], v [B, S, K, Dv] -> out [B, T, H, Dv] in q's dtype, lse [B, T, H] wide."""
    return torch.ops.longtrain._attention_forward(q, k, v, sink_logits, *_options(call, instruction_set))


def backward(call: AttentionCall, dout, q, k, v, out, lse, delta, dk, dv, instruction_set: str = ""):
    """Adds into dk [B, S, K, D] and dv [B, S, K, Dv] (wide), returns dq. delta [B, T, H] as in `reference.py`."""
    return torch.ops.longtrain._attention_backward(
        dout, q, k, v, lse, delta, dk, dv, *_options(call, instruction_set)
    )
