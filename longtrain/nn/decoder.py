"""The pre-norm decoder layer, and the stack of them: embedding in, normalised hidden states out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longtrain.nn.attention import Attention
from longtrain.nn.config import ModelConfig
from longtrain.nn.ends import TokenEmbed
from longtrain.nn.lact import LaCT
from longtrain.nn.linear_attention import DeltaNet, LinearAttention
from longtrain.nn.long_conv import LongConvMixerModule
from longtrain.nn.mlp import SwiGLU
from longtrain.nn.norm import RMSNorm
from longtrain.span import Layout


def _attention(config: ModelConfig, index: int) -> Attention:
    return Attention(
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.resolved_head_dim,
        window=config.layer_window(index),
        rope_base=config.rope_base,
        rope_fraction=config.rope_fraction,
        dropout=config.attention_dropout,
        layer_index=index,
    )


def _conv(config: ModelConfig, index: int) -> LongConvMixerModule:
    settings = dict(implicit=True) if config.conv_implicit else dict(squash=config.conv_squash)
    return LongConvMixerModule(config.hidden_size, config.conv_taps, layer_index=index, **settings)


def _heads(config: ModelConfig) -> dict[str, Any]:
    shape = dict(hidden_size=config.hidden_size, num_heads=config.num_heads, head_dim=config.resolved_head_dim)
    return {**shape, "norm_eps": config.norm_eps}


MIXERS: dict[str, tuple[str, Callable[[ModelConfig, int], nn.Module]]] = {
    "attention": ("self_attn", _attention),
    "window": ("self_attn", _attention),
    "linear": ("linear", lambda config, index: LinearAttention(**_heads(config))),
    "delta": ("delta", lambda config, index: DeltaNet(**_heads(config), layer_index=index)),
    "lact": ("lact", lambda config, index: LaCT(**_heads(config), chunk_tokens=config.lact_chunk)),
    "conv": ("conv", _conv),
}
"""By kind of layer (`ModelConfig.layers`): the name its mixer's parameters have, and how it is made. Each has
``mixer(documents, dropout_seed)``, which says what is to be computed (several in a tuple, in the order in which they are called), and
``forward(x_BTE, positions_BT, mix) -> [B, T, E]``."""


class DecoderLayer(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``; ``[B, T, E] -> [B, T, E]``. The mixer is attention, or of another kind.

    It can be streamed: everything but `mix` is token-local, `token_args` names the arguments that run along the tokens, and
    `mixers` says what `mix` has to compute (`longtrain.stream.protocol.StreamableLayer`).
    """

    token_args = {"positions_BT": 1}

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer_name, make = MIXERS[config.layer_kind(index)]
        self.add_module(self.mixer_name, make(config, index))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    @property
    def token_mixer(self) -> nn.Module:
        return self.get_submodule(self.mixer_name)

    def mixers(
        self, *, positions_BT: Tensor, documents: Layout | None = None, dropout_seed: int | None = None
    ) -> tuple[Any, ...]:
        found = self.token_mixer.mixer(documents, dropout_seed)
        return found if isinstance(found, tuple) else (found,)

    def forward(
        self, x_BTE: Tensor, *, positions_BT: Tensor, documents: Layout | None = None, dropout_seed: int | None = None, mix=None
    ) -> Tensor:
        if mix is None:
            mixers = iter(self.mixers(positions_BT=positions_BT, documents=documents, dropout_seed=dropout_seed))

            def mix(*inputs: Tensor) -> Tensor:
                return next(mixers)(*inputs)

        x_BTE = x_BTE + self.token_mixer(self.input_layernorm(x_BTE), positions_BT, mix)
        return x_BTE + self.mlp(self.post_attention_layernorm(x_BTE))

    def example(self, tokens: int) -> tuple[Tensor, dict]:
        """A small random input ``(x [1, tokens, E], arguments)`` in this layer's dtype and on its device."""
        weight = self.input_layernorm.weight
        x_BTE = torch.randn(1, tokens, weight.numel(), dtype=weight.dtype, device=weight.device)
        return x_BTE, {"positions_BT": torch.arange(tokens, device=weight.device)[None], "dropout_seed": 0}


class Decoder(nn.Module):
    """Token embedding, layers, final norm. The norm is applied by the head, chunk by chunk, so `forward` ends before it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_embed = TokenEmbed()
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, input_ids_BT: Tensor, documents: Layout, dropout_seed: int | None, *, to_loss: bool = False) -> Tensor:
        """Hidden states ``[B, T, E]`` before the final norm. `to_loss`: they will go into `TokenLoss` as they are."""
        positions_BT = documents.positions(input_ids_BT.device)[None].expand_as(input_ids_BT)
        x_BTE = self.token_embed(input_ids_BT, self.embed_tokens, to_loss=to_loss)
        for layer in self.layers:
            x_BTE = layer(x_BTE, positions_BT=positions_BT, documents=documents, dropout_seed=dropout_seed)
        return x_BTE
