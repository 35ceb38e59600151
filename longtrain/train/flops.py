"""Model FLOPs utilisation (MFU; Chowdhery et al. 2022, arXiv:2204.02311, appendix B): what the model needs, against what the device can do."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from longtrain.data.packing import Batch
from longtrain.nn import ModelConfig

RULE = "6 x matrix parameters x tokens + 12 x heads x head dim x visible query-key pairs; nothing recomputed is counted"


def update_flops(config: ModelConfig, batches: Sequence[Batch]) -> float:
    """FLOPs of one update by RULE: forward 2 a parameter and token, 4 D a head and pair (scores, and their product with the values),
    backward twice that. Pairs are those that causality, windows and documents leave; padding counts as tokens.
    """
    tokens = sum(b.input_ids_BT.numel() for b in batches)
    width, head_dim = config.hidden_size, config.resolved_head_dim
    attention = 2 * width * head_dim * (config.num_heads + config.num_kv_heads)
    layer = attention + 3 * width * config.intermediate_size
    parameters = config.num_layers * layer + config.vocab_size * width
    lengths = [int(n) for b in batches for n in b.cu_seqlens.diff()]
    pairs = sum(visible_pairs(n, config.layer_window(layer)) for layer in range(config.num_layers) for n in lengths)
    return 6.0 * parameters * tokens + 12.0 * config.num_heads * head_dim * pairs


def visible_pairs(tokens: int, window: int | None) -> int:
    """Pairs (query, key) of one causal document, where a query sees `window` tokens, itself included."""
    seen = min(tokens, window or tokens)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen


def measure_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product in `dtype`, the best of five: 768 on a CPU (milliseconds), 8192 on a GPU."""
    size = 768 if device.type == "cpu" else 8192
    a, b = (torch.zeros(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)
