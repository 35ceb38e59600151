"""Mixers of a decoder layer whose memory is a matrix: gated linear attention and the (gated) delta rule. In the place of `nn.Attention`.

Positions are not rotated: decays and order tell what is far. `DeltaNet` has its paper's short convolution of queries, keys and values,
without which it does not learn to store a value under the key before it, whatever layer stands below; `LinearAttention`, as in its paper,
has none.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtrain.nn.long_conv import LongConv
from longtrain.nn.norm import RMSNorm
from longtrain.ops.mixers import LongConvMixer
from longtrain.ops.state_mixers import LinearAttentionMixer
from longtrain.span import Layout

_GLA_TEMPERATURE = 16
"""GLA, section 4.4: the log of a sigmoid, divided by this, so that little is forgotten in a step."""


def half_lives(count: int, longest: float) -> Tensor:
    """``[count]`` float64: tokens after which half is forgotten, from `longest` to 16, evenly in their logarithm."""
    return torch.logspace(math.log2(max(longest, 16)), math.log2(16), count, base=2.0, dtype=torch.float64)


class HeadOutput(nn.Module):
    """``o_proj(norm(out) * silu(gate_proj(x)))``, the norm by head. State: ``norm [D]``, ``gate_proj [H D, E]``, ``o_proj [E, H D]``."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(head_dim, norm_eps)
        self.gate_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(self, out_BTHD: Tensor, x_BTE: Tensor) -> Tensor:
        return self.o_proj(self.norm(out_BTHD).flatten(-2) * F.silu(self.gate_proj(x_BTE)))


class LinearAttention(nn.Module):
    """Gated linear attention (Yang et al. 2023, arXiv:2312.06635) ``[B, T, E] -> [B, T, E]``: every key feature forgets at its own pace.

    Decays come from x through `decay_rank` features; at the start of training half-lives lie evenly (in their logarithm) from 16 to
    `longest_half_life` tokens.
    State: ``q_proj, k_proj, v_proj [H D, E]``, ``decay_down [R, E]``, ``decay_up [H D, R]`` with a bias, ``output``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        decay_rank: int = 16,
        longest_half_life: float = 8192,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden_size, num_heads * head_dim, bias=False) for _ in range(3))
        self.decay_down = nn.Linear(hidden_size, decay_rank, bias=False)
        self.decay_up = nn.Linear(decay_rank, num_heads * head_dim)
        with torch.no_grad():  # log sigmoid(bias) / 16 = -log(2) / half-life
            bias = torch.logit(0.5 ** (_GLA_TEMPERATURE / half_lives(head_dim, longest_half_life))).flip(0)
            self.decay_up.bias.copy_(bias.repeat(num_heads))
        self.output = HeadOutput(hidden_size, num_heads, head_dim, norm_eps)

    def mixer(self, documents: Layout | None = None, dropout_seed: int | None = None) -> LinearAttentionMixer:
        return LinearAttentionMixer(gated=True, documents=documents)

    def forward(self, x_BTE: Tensor, positions_BT: Tensor, mix) -> Tensor:
        """`mix`: callable of (q, k, v, decay), the whole mixer or the streaming engine's part of it."""
        gates = self.decay_up(self.decay_down(x_BTE))
        decay = F.logsigmoid(gates.to(torch.promote_types(gates.dtype, torch.float32))) / _GLA_TEMPERATURE
        q, k, v, decay = (
            t.unflatten(-1, (-1, self.head_dim)) for t in (self.q_proj(x_BTE), self.k_proj(x_BTE), self.v_proj(x_BTE), decay)
        )
        return self.output(mix(q, k, v, decay), x_BTE)


class DeltaNet(nn.Module):
    """The delta rule (Yang et al. 2024, arXiv:2406.06484), by default gated (arXiv:2412.06464), ``[B, T, E] -> [B, T, E]``: a token
    overwrites what its key pointed to.

    Queries, keys and values pass a causal convolution of `short_taps` taps a channel, beginning near the identity, and a SiLU. Keys and
    queries then have norm 1; beta is a sigmoid of x. A head's decay is ``-exp(log_rate) softplus(step_proj(x) + step_bias)``
    as in Mamba-2, but not drawn as there, where no head remembers half of anything for 700 tokens, and most for 10: at the start of
    training half-lives lie evenly (in their logarithm) from `longest_half_life` tokens, the first head's, to 16.
    State: ``q_proj, k_proj, v_proj [H D, E]``, ``short.filter.taps [3 H D, W]``, ``short.skip [3 H D]``, ``beta_proj [H, E]``, ``output``;
    gated also ``step_proj [H, E]``, ``log_rate, step_bias [H]``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        gated: bool = True,
        short_taps: int = 4,
        longest_half_life: float = 8192,
        norm_eps: float = 1e-6,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        self.head_dim, self.gated = head_dim, gated
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden_size, num_heads * head_dim, bias=False) for _ in range(3))
        self.short = LongConv(3 * num_heads * head_dim, short_taps, init="normal", init_std=0.3, squash=0.0, layer_index=layer_index)
        self.beta_proj = nn.Linear(hidden_size, num_heads, bias=False)
        if gated:
            self.step_proj = nn.Linear(hidden_size, num_heads, bias=False)
            self.log_rate = nn.Parameter(torch.zeros(num_heads))
            steps = math.log(2) / half_lives(num_heads, longest_half_life)
            self.step_bias = nn.Parameter(torch.log(torch.expm1(steps)).to(torch.get_default_dtype()))  # softplus of it is the step
        self.output = HeadOutput(hidden_size, num_heads, head_dim, norm_eps)

    def mixer(self, documents: Layout | None = None, dropout_seed: int | None = None) -> tuple[LongConvMixer, LinearAttentionMixer]:
        """The short convolution, then the delta rule."""
        return self.short.mixer(documents), LinearAttentionMixer(gated=self.gated, delta=True, documents=documents)

    def forward(self, x_BTE: Tensor, positions_BT: Tensor, mix) -> Tensor:
        """`mix`: called with queries, keys and values side by side, then with (q, k, v, decay if gated, beta); the whole mixers or the
        streaming engine's part of them."""
        qkv_BTE = mix(torch.cat([p(x_BTE) for p in (self.q_proj, self.k_proj, self.v_proj)], -1))
        q, k, v = F.silu(qkv_BTE).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        wide = torch.promote_types(x_BTE.dtype, torch.float32)
        rates = [self.beta_proj(x_BTE).to(wide).sigmoid()]
        if self.gated:
            rates.insert(0, -self.log_rate.to(wide).exp() * F.softplus(self.step_proj(x_BTE).to(wide) + self.step_bias.to(wide)))
        return self.output(mix(unit(q), unit(k), v, *rates), x_BTE)


def unit(x: Tensor) -> Tensor:
    """The last axis scaled to norm 1, in float32 or wider."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)
