"""The classifier: long convolutions over the whole sequence, in both directions (Fu et al. 2023, arXiv:2302.06646, section 4.1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from longtrain.nn import LongConv, RMSNorm


class ConvLayer(nn.Module):
    """``x + dropout(GLU(linear(gelu(conv(n)))))``, ``n = norm(x)``, ``[B, T, E] -> [B, T, E]``; with `center` less n's mean over them.

    What all tokens have in common (an image's background) comes out of each filter as the sum of its taps, many times what a few tokens
    that differ come to, and training stays at chance for long.
    """

    def __init__(self, width: int, tokens: int, *, center: bool, dropout: float, layer_index: int, **filter_settings) -> None:
        super().__init__()
        self.center = center
        self.norm = RMSNorm(width)
        self.conv = LongConv(width, 2 * tokens - 1, causal=False, layer_index=layer_index, **filter_settings)
        self.linear, self.dropout = nn.Linear(width, 2 * width), nn.Dropout(dropout)

    def forward(self, x_BTE: Tensor, real_BT1: Tensor) -> Tensor:
        n_BTE = self.norm(x_BTE)
        if self.center:
            n_BTE = n_BTE - real_mean(n_BTE, real_BT1)[:, None]
        mixed_BTE = self.conv(n_BTE * real_BT1)
        return x_BTE + self.dropout(F.glu(self.linear(F.gelu(mixed_BTE))))


class SequenceClassifier(nn.Module):
    """Token ids ``[B, T]`` (0 is padding) to logits ``[B, classes]``: embedding, layers, mean over the real tokens, linear."""

    def __init__(
        self, vocab_size: int, classes: int, width: int, layers: int, tokens: int, *, center: bool = True, dropout: float = 0.0,
        **filter_settings,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(
            ConvLayer(width, tokens, center=center, dropout=dropout, layer_index=i, **filter_settings) for i in range(layers)
        )
        self.norm, self.head = RMSNorm(width), nn.Linear(width, classes)

    def forward(self, ids_BT: Tensor) -> Tensor:
        real_BT1 = (ids_BT > 0)[..., None].to(self.embed.weight.dtype)
        x_BTE = self.embed(ids_BT)
        for layer in self.layers:
            x_BTE = layer(x_BTE, real_BT1)
        return self.head(real_mean(self.norm(x_BTE), real_BT1))


def real_mean(x_BTE: Tensor, real_BT1: Tensor) -> Tensor:
    """``[B, E]``: mean over the tokens that are no padding."""
    return (x_BTE * real_BT1).sum(1) / real_BT1.sum(1).clamp_min(1)
