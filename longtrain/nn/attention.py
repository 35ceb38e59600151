"""Grouped-query self-attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions, full or windowed."""

from __future__ import annotations

from torch import Tensor, nn

from longtrain.nn.rotary import RotaryEmbedding
from longtrain.ops.mixers import AttentionMixer, nth_seed
from longtrain.span import Layout


class Attention(nn.Module):
    """Causal self-attention ``[B, T, E] -> [B, T, E]``.

    State: ``q_proj [H D, E]``, ``k_proj, v_proj [K D, E]``, ``o_proj [E, H D]``, as in Llama checkpoints.
    `window`: tokens a query sees, itself included (a Hugging Face sliding window); None sees all.
    `dropout`: on attention probabilities, counter-based: the mask follows from (seed, layer, head, query, key) alone.
    Attribute `kernel_fallback`: as in `longtrain.ops.attention`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        window: int | None = None,
        rope_base: float = 10_000.0,
        rope_fraction: float = 1.0,
        dropout: float = 0.0,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        self.head_dim, self.window, self.dropout, self.layer_index = head_dim, window, dropout, layer_index
        self.kernel_fallback = "error"
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.rotary = RotaryEmbedding(head_dim, rope_base, rope_fraction)

    def mixer(self, documents: Layout | None = None, dropout_seed: int | None = None) -> AttentionMixer:
        dropout_p = self.dropout if self.training else 0.0
        if dropout_p > 0 and dropout_seed is None:
            raise ValueError("attention dropout is on and dropout_seed is None: pass the step's seed (LanguageModel draws it itself)")
        seed = None if dropout_p == 0 else nth_seed(dropout_seed, self.layer_index)
        window_size = (-1, -1) if self.window is None else (self.window - 1, 0)
        return AttentionMixer(
            window_size=window_size, dropout_p=dropout_p, dropout_seed=seed, documents=documents, kernel_fallback=self.kernel_fallback
        )

    def forward(self, x_BTE: Tensor, positions_BT: Tensor, mix) -> Tensor:
        """`mix`: callable of (q, k, v), the whole attention or the streaming engine's part of it."""
        q_BTHD, k_BTKD, v_BTKD = (
            projection(x_BTE).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        angles = self.rotary.angles(positions_BT, q_BTHD.dtype)
        out_BTHD = mix(self.rotary(q_BTHD, angles), self.rotary(k_BTKD, angles), v_BTKD)
        return self.o_proj(out_BTHD.flatten(-2))
