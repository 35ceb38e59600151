"""Model FLOPs utilisation (MFU; Chowdhery et al. 2022, arXiv:2204.02311, appendix B): what the model needs, against what the device can
do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from longtrain.data.packing import Batch
from longtrain.nn.replacements.frozen import FrozenLinear
from longtrain.train.calls import is_transformers

STATE_PRODUCTS = {"linear": 2, "delta": 3, "lact": 9}
"""Products of a token with a matrix D x D of each head, by kind of layer: read and written, erased, read and learned by three matrices."""

RULE = (
    "6 x matrix parameters x tokens (4 x frozen ones; states count each time a token meets them) + 12 x heads x head dim x visible "
    "query-key pairs; nothing recomputed is counted"
)


@dataclass(frozen=True, slots=True)
class Costs:
    """What RULE needs to know of a model."""

    parameters: float
    """Matrix parameters that a token meets: of experts, those of as many as it is sent to."""
    attention: tuple[tuple[int, int | None], ...]
    """Of each layer: heads times head dim, and the tokens that a query sees (None: all)."""
    trained: bool = True
    """Whether the matrices have gradients: without (LoRA) their backward pass is as much work as their forward pass, not twice."""


def costs_of(model: nn.Module) -> Costs:
    """Of longtrain's own model, or of one of transformers by what its configuration says."""
    if not is_transformers(model):
        config = model.config
        head_dim = config.resolved_head_dim
        kinds = [config.layer_kind(i) for i in range(config.num_layers)]
        projections = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))
        states = sum(STATE_PRODUCTS.get(kind, 0) for kind in kinds) * config.num_heads * head_dim**2
        windows = (config.layer_window(i) for i, kind in enumerate(kinds) if kind in ("attention", "window"))
        features = config.num_heads * head_dim
        return Costs(projections + states + config.vocab_size * config.hidden_size, tuple((features, w) for w in windows))
    text = model.config.get_text_config()
    embedding, head = (getattr(module, "weight", None) for module in (model.get_input_embeddings(), model.get_output_embeddings()))
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    base = [p for name, p in model.named_parameters() if ".lora_" not in name]
    frozen = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    inside = {id(p) for module in frozen for p in module.parameters()}  # codes and scales are no matrices of their own
    matrices = [p for p in base if p.ndim >= 2 and (p is not embedding or p is head) and id(p) not in inside]
    met = [p.numel() * (min(1, chosen / p.shape[0]) if p.ndim == 3 else 1) for p in matrices] + [
        m.in_features * m.out_features for m in frozen
    ]
    features = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    pairs = [kind for kind in kinds if kind.endswith("attention") and kind != "linear_attention"]  # which has a state instead
    attention = tuple((features, window if kind == "sliding_attention" else None) for kind in pairs)
    return Costs(sum(met), attention, trained=any(p.requires_grad for p in base))


def update_flops(costs: Costs, batches: Sequence[Batch]) -> float:
    """FLOPs of one update by RULE: forward 2 a parameter and token, 4 D a head and pair (scores, and their product with the values),
    backward twice that. Pairs are those that causality, windows and documents leave; padding counts as tokens.
    """
    tokens = sum(b.input_ids_BT.numel() for b in batches)
    lengths = [int(n) for b in batches for n in b.cu_seqlens.diff()]
    pairs = sum(features * visible_pairs(n, window) for features, window in costs.attention for n in lengths)
    return (6.0 if costs.trained else 4.0) * costs.parameters * tokens + 12.0 * pairs


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
