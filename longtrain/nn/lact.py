"""Large-chunk test-time training (LaCT; Zhang et al. 2025, arXiv:2505.23884) as a decoder layer's mixer, in the place of `nn.Attention`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtrain.nn.linear_attention import HeadOutput, unit
from longtrain.ops.state_mixers import LaCTMixer
from longtrain.span import Layout


class LaCT(nn.Module):
    """Each head has a small network that learns its keys' values while the sequence is read, ``[B, T, E] -> [B, T, E]``.

    `chunk_tokens`: the network changes once in so many tokens, and tokens of one chunk do not see each other through it: put a `window`
    layer as wide beside it. `momentum` of its updates; its rates come from x and begin at `base_rate` (keys have norm 1 and gradients are
    not made orthogonal, so that rates far below 1 leave nothing behind that can be read). See `longtrain.ops.lact`.
    State: ``q_proj, k_proj, v_proj [H D, E]``, ``rate_proj [3 H, E]``, ``weights [H, 3, F, D]`` (the network every document begins with),
    ``output``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        chunk_tokens: int,
        inner_dim: int | None = None,
        momentum: float = 0.9,
        base_rate: float = 1.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if not isinstance(chunk_tokens, int) or chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be an integer of at least 1, found {chunk_tokens!r}: the network changes once in so many")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), found {momentum!r}")
        if not 0 < base_rate < math.inf:
            raise ValueError(f"base_rate must be above 0, found {base_rate!r}")
        self.head_dim, self.chunk_tokens, self.momentum = head_dim, chunk_tokens, momentum
        self.rate_bias = math.log(math.expm1(base_rate))  # softplus of it is the base rate
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden_size, num_heads * head_dim, bias=False) for _ in range(3))
        self.rate_proj = nn.Linear(hidden_size, 3 * num_heads, bias=False)
        self.weights = nn.Parameter(torch.randn(num_heads, 3, inner_dim or head_dim, head_dim) * head_dim**-0.5)
        self.output = HeadOutput(hidden_size, num_heads, head_dim, norm_eps)

    def mixer(self, documents: Layout | None = None, dropout_seed: int | None = None) -> LaCTMixer:
        return LaCTMixer(weights=self.weights, chunk_tokens=self.chunk_tokens, momentum=self.momentum, documents=documents)

    def forward(self, x_BTE: Tensor, positions_BT: Tensor, mix) -> Tensor:
        """`mix`: callable of (q, k, v, rates), the whole mixer or the streaming engine's part of it."""
        q, k, v = (F.silu(p(x_BTE)).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        wide = torch.promote_types(x_BTE.dtype, torch.float32)
        rates = F.softplus(self.rate_proj(x_BTE).to(wide) + self.rate_bias).unflatten(-1, (-1, 3))
        return self.output(mix(unit(q), unit(k), v, rates), x_BTE)
