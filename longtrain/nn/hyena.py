"""The Hyena operator: long convolutions between gates (Poli et al. 2023, arXiv:2302.10866, section 3, definition 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longtrain.nn.filters import ImplicitFilter
from longtrain.nn.long_conv import LongConv
from longtrain.ops.mixers import LongConvMixer
from longtrain.span import Layout


class Hyena(nn.Module):
    """``[B, T, E] -> [B, T, E]``, causal unless told otherwise, T up to `max_tokens` in a document.

        v, x1, .. xN = short_filter(in_proj(u))        z1 = x1 v        z(n+1) = x(n+1) (h_n * z_n + skip_n z_n)        y = out_proj(z_N)

    `order` N of at least 2: N - 1 long convolutions with implicit filters h. It streams by itself as a layer
    (`longtrain.stream.protocol.StreamableLayer`), by channel group.
    """

    token_args: dict[str, int] = {}

    def __init__(
        self,
        width: int,
        max_tokens: int,
        *,
        order: int = 2,
        short_taps: int = 3,
        causal: bool = True,
        layer_index: int = 0,
        **filter_settings,
    ) -> None:
        super().__init__()
        if order < 2:
            raise ValueError(f"Hyena's order must be at least 2 (one long convolution between two gates), found {order}")
        self.order, self.causal = order, causal
        self.in_proj = nn.Linear(width, (order + 1) * width)
        self.out_proj = nn.Linear(width, width)
        self.short = LongConv(
            (order + 1) * width, short_taps, causal=causal, init="normal", init_std=0.3, squash=0.0, layer_index=layer_index
        )
        self.filters = nn.ModuleList(
            ImplicitFilter(width, max_tokens, causal=causal, layer_index=layer_index, **filter_settings) for _ in range(order - 1)
        )
        self.skips = nn.ParameterList(torch.ones(width) for _ in range(order - 1))

    def mixers(self, *, documents: Layout | None = None) -> tuple[LongConvMixer, ...]:
        """The short convolution, then the long ones."""
        tokens = None if documents is None else documents.tokens
        return (
            self.short.mixer(documents),
            *(
                LongConvMixer(filter=filter(tokens), skip=skip, causal=self.causal, documents=documents)
                for filter, skip in zip(self.filters, self.skips, strict=True)
            ),
        )

    def forward(self, x_BTE: Tensor, *, documents: Layout | None = None, mix=None) -> Tensor:
        short, *longs = self.mixers(documents=documents) if mix is None else [mix] * self.order
        v_BTE, first_BTE, *gates = short(self.in_proj(x_BTE)).chunk(self.order + 1, dim=-1)
        z_BTE = longs[0](v_BTE, first_BTE, gates[0])
        for long, gate_BTE in zip(longs[1:], gates[1:], strict=True):
            z_BTE = gate_BTE * long(z_BTE)
        return self.out_proj(z_BTE)

    def example(self, tokens: int) -> tuple[Tensor, dict]:
        """A small random input ``x [1, tokens, E]`` in this layer's dtype and on its device, and no arguments."""
        weight = self.out_proj.weight
        return torch.randn(1, tokens, len(weight), dtype=weight.dtype, device=weight.device), {}
