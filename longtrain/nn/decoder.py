"""The pre-norm decoder layer, and the stack of them: embedding in, normalised hidden states out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longtrain.nn.attention import Attention
from longtrain.nn.config import ModelConfig
from longtrain.nn.ends import TokenEmbed
from longtrain.nn.mlp import SwiGLU
from longtrain.nn.norm import RMSNorm
from longtrain.ops.mixers import AttentionMixer
from longtrain.span import Layout


class DecoderLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``; ``[B, T, E] -> [B, T, E]``.

    It can be streamed: everything but `mix` is token-local, `token_args` names the arguments that run along the tokens, and
    `mixers` says what `mix` has to compute (`longtrain.stream.protocol.StreamableLayer`).
    """

    token_args = {"positions_BT": 1}

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(
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
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def mixers(
        self, *, positions_BT: Tensor, documents: Layout | None = None, dropout_seed: int | None = None
    ) -> tuple[AttentionMixer, ...]:
        return (self.self_attn.mixer(documents, dropout_seed),)

    def forward(
        self, x_BTE: Tensor, *, positions_BT: Tensor, documents: Layout | None = None, dropout_seed: int | None = None, mix=None
    ) -> Tensor:
        if mix is None:
            (mix,) = self.mixers(positions_BT=positions_BT, documents=documents, dropout_seed=dropout_seed)
        x_BTE = x_BTE + self.self_attn(self.input_layernorm(x_BTE), positions_BT, mix)
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
