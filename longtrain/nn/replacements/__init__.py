"""Modules that take the place of torch's and transformers' one by one: same arguments, same state_dict keys, same numbers.

    layer = longtrain.nn.TransformerEncoderLayer(512, 8, batch_first=True)      # as torch.nn.TransformerEncoderLayer
    layer.load_state_dict(old.state_dict())
    model.model.layers[0].self_attn = longtrain.nn.hf_attention(model.model.layers[0].self_attn)

What they bring is memory: no ``[T, T]`` probabilities or masks, no logits or MLP activations beyond a chunk, filters as long as the
sequence. An option that they cannot honour is refused by name.
"""

from longtrain.nn.replacements.attention import MultiheadAttention
from longtrain.nn.replacements.conv import Conv1d
from longtrain.nn.replacements.fp8 import FP8Linear
from longtrain.nn.replacements.frozen import FrozenLinear, freeze_linears
from longtrain.nn.replacements.hf import by_chunks, hf_attention
from longtrain.nn.replacements.loss import LinearCrossEntropy
from longtrain.nn.replacements.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "Conv1d", "FP8Linear", "FrozenLinear", "LinearCrossEntropy", "MultiheadAttention", "TransformerDecoderLayer", "TransformerEncoderLayer",
    "by_chunks", "freeze_linears", "hf_attention",
]
