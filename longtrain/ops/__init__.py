"""Functions on tensors: each op a folder, its reference beside its fast backends. Knows no module and no model."""

from longtrain.ops.attention import attention, attention_backward, merge_attention
from longtrain.ops.linear_attention import linear_attention, linear_attention_backward
from longtrain.ops.linear_cross_entropy import linear_cross_entropy
from longtrain.ops.long_conv import long_conv, long_conv_2d, long_conv_backward

__all__ = [
    "attention",
    "attention_backward",
    "linear_attention",
    "linear_attention_backward",
    "linear_cross_entropy",
    "long_conv",
    "long_conv_2d",
    "long_conv_backward",
    "merge_attention",
]
