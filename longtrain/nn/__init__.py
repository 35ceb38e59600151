"""Modules: replacements for torch.nn on long sequences, and the language model built from them."""

from longtrain.nn.attention import Attention
from longtrain.nn.config import ModelConfig
from longtrain.nn.decoder import Decoder, DecoderLayer
from longtrain.nn.ends import TokenEmbed, TokenLoss, count_targets
from longtrain.nn.hyena import Hyena
from longtrain.nn.lact import LaCT
from longtrain.nn.linear_attention import DeltaNet, LinearAttention
from longtrain.nn.long_conv import LongConv, LongConvMixerModule, parameter_groups
from longtrain.nn.mlp import SwiGLU
from longtrain.nn.model import LanguageModel, ModelOutput
from longtrain.nn.monarch_mixer import MonarchMixerBlock
from longtrain.nn.norm import RMSNorm
from longtrain.nn.replacements import (
    Conv1d,
    FP8Linear,
    FrozenLinear,
    LinearCrossEntropy,
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    by_chunks,
    freeze_linears,
    hf_attention,
)
from longtrain.nn.rotary import RotaryEmbedding

__all__ = [
    "Attention",
    "Conv1d",
    "Decoder",
    "DecoderLayer",
    "DeltaNet",
    "FP8Linear",
    "FrozenLinear",
    "Hyena",
    "LaCT",
    "LanguageModel",
    "LinearAttention",
    "LinearCrossEntropy",
    "LongConv",
    "LongConvMixerModule",
    "ModelConfig",
    "ModelOutput",
    "MultiheadAttention",
    "MonarchMixerBlock",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
    "TokenEmbed",
    "TokenLoss",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "by_chunks",
    "count_targets",
    "freeze_linears",
    "hf_attention",
    "parameter_groups",
]
