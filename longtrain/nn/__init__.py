"""Modules: replacements for torch.nn on long sequences, and the language model built from them."""

from longtrain.nn.attention import Attention
from longtrain.nn.config import ModelConfig
from longtrain.nn.decoder import Decoder, DecoderLayer
from longtrain.nn.ends import TokenEmbed, TokenLoss, count_targets
from longtrain.nn.mlp import SwiGLU
from longtrain.nn.model import LanguageModel, ModelOutput
from longtrain.nn.norm import RMSNorm
from longtrain.nn.rotary import RotaryEmbedding

__all__ = [
    "Attention",
    "Decoder",
    "DecoderLayer",
    "LanguageModel",
    "ModelConfig",
    "ModelOutput",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
    "TokenEmbed",
    "TokenLoss",
    "count_targets",
]
