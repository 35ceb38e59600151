"""The encoder block of Monarch Mixer (M2-BERT; Fu et al. 2023, arXiv:2310.12109, section 4.1): no attention, no dense MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtrain.nn.filters import ImplicitFilter
from longtrain.nn.long_conv import LongConv
from longtrain.nn.norm import RMSNorm
from longtrain.ops.mixers import LongConvMixer
from longtrain.span import Layout


class BlockDiagonal(nn.Module):
    """A linear map of blocks: each output sees its own block of the inputs. State: ``weight [blocks, out / blocks, in / blocks]``."""

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        if inputs % blocks or outputs % blocks:
            raise ValueError(f"{blocks} blocks must divide {inputs} inputs and {outputs} outputs")
        self.weight = nn.Parameter(torch.randn(blocks, outputs // blocks, inputs // blocks) * (inputs // blocks) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("goi,...gi->...go", self.weight, x.unflatten(-1, (len(self.weight), -1))).flatten(-2)


class MonarchMixerBlock(nn.Module):
    """``[B, T, E] -> [B, T, E]``; every token sees all others of its document, of up to `max_tokens`.

        v, x1, x2 = short(in_proj(n))        n = norm(x)
        x = x + out_proj(x2 (h * (x1 v)) + r * n)                    h, r: two-sided implicit filters, each with a skip
        x = x + down(gelu(gate(norm(x))) up(norm(x)))                gate, up, down: block diagonal

    Norms stand before (M2-BERT's stand behind), so that it trains without a warm-up. It streams by channel group
    (`longtrain.stream.protocol.StreamableLayer`).
    """

    token_args: dict[str, int] = {}

    def __init__(
        self,
        width: int,
        max_tokens: int,
        *,
        intermediate: int | None = None,
        blocks: int = 4,
        short_taps: int = 3,
        layer_index: int = 0,
        **filter_settings,
    ) -> None:
        super().__init__()
        intermediate = 4 * width if intermediate is None else intermediate
        self.mixer_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.short = LongConv(3 * width, short_taps, causal=False, init="normal", init_std=0.3, squash=0.0, layer_index=layer_index)
        self.long, self.residual = (
            ImplicitFilter(width, max_tokens, causal=False, layer_index=layer_index, **filter_settings) for _ in range(2)
        )
        self.long_skip, self.residual_skip = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.gate, self.up = BlockDiagonal(width, intermediate, blocks), BlockDiagonal(width, intermediate, blocks)
        self.down = BlockDiagonal(intermediate, width, blocks)

    def mixers(self, *, documents: Layout | None = None) -> tuple[LongConvMixer, ...]:
        """The short convolution, the gated long one, the residual long one."""
        tokens = None if documents is None else documents.tokens
        long, residual = (
            LongConvMixer(filter=filter(tokens), skip=skip, causal=False, documents=documents)
            for filter, skip in ((self.long, self.long_skip), (self.residual, self.residual_skip))
        )
        return self.short.mixer(documents), long, residual

    def forward(self, x_BTE: Tensor, *, documents: Layout | None = None, mix=None) -> Tensor:
        short, long, residual = self.mixers(documents=documents) if mix is None else [mix] * 3
        n_BTE = self.mixer_norm(x_BTE)
        mixed_BTE = long(*short(self.in_proj(n_BTE)).chunk(3, dim=-1))
        x_BTE = x_BTE + self.out_proj(mixed_BTE + residual(n_BTE))
        n_BTE = self.mlp_norm(x_BTE)
        return x_BTE + self.down(F.gelu(self.gate(n_BTE)) * self.up(n_BTE))

    def example(self, tokens: int) -> tuple[Tensor, dict]:
        """A small random input ``x [1, tokens, E]`` in this layer's dtype and on its device, and no arguments."""
        weight = self.out_proj.weight
        return torch.randn(1, tokens, len(weight), dtype=weight.dtype, device=weight.device), {}
