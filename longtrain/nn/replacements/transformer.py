"""`torch.nn.TransformerEncoderLayer` and `TransformerDecoderLayer` on longtrain's attention; `lt.apply` can stream stacks of them.

    encoder = torch.nn.TransformerEncoder(longtrain.nn.TransformerEncoderLayer(512, 8, batch_first=True), 6)
    lt.apply(encoder, lt.Plan(chunk_tokens=1024))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longtrain.nn.replacements.attention import MultiheadAttention, paddings
from longtrain.ops.mixers import AttentionMixer


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """As torch's: same constructor and state. ``[B, T, E] -> [B, T, E]``. Streams with ``batch_first=True`` and no padding.

    Further argument: `cu_seqlens`, documents packed into one row.
    """

    token_args: dict[str, int] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention  # the same parameters, initialised as torch does
        self.activation_relu_or_gelu = 0  # torch.nn.TransformerEncoder would hand over nested tensors, for kernels of its own

    def call(self, streamed: Callable[..., Tensor], src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """How `torch.nn.TransformerEncoder` and others call the layer, as the streaming engine is called: all but `src` by name."""
        arguments = dict(zip(("src_mask", "src_key_padding_mask", "is_causal"), args, strict=False)) | kwargs
        _check_mask("src_mask", arguments.get("src_mask"), src)
        return streamed(src, **arguments)

    def mixers(
        self, *, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[AttentionMixer, ...]:
        _check_streamable(self.self_attn, src_key_padding_mask)
        return (self.self_attn.mixer(src_mask, is_causal, cu_seqlens),)

    def forward(
        self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool = False, *,
        cu_seqlens: Tensor | None = None, mix=None,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            out, _ = self.self_attn(
                x, x, x, key_padding_mask=src_key_padding_mask, attn_mask=src_mask, is_causal=is_causal, cu_seqlens=cu_seqlens, mix=mix
            )
            return self.dropout1(out)

        parts = (attend, self.norm1), (self._ff_block, self.norm2)
        return _residual(src, parts, self.norm_first)

    def example(self, tokens: int) -> tuple[Tensor, dict[str, Any]]:
        return _example(self.linear1.weight, tokens), {"is_causal": True}


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """As torch's: same constructor and state. ``[B, T, E]`` and memory ``[B, S, E]`` -> ``[B, T, E]``.

    Streams along the target, with the memory whole, with ``batch_first=True``, no padding of the target and no mask on the memory.
    """

    token_args: dict[str, int] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = self.multihead_attn.__class__ = MultiheadAttention

    def call(self, streamed: Callable[..., Tensor], tgt: Tensor, memory: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """How `torch.nn.TransformerDecoder` calls the layer, as the streaming engine is called: all but `tgt` by name."""
        names = ("tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "tgt_is_causal", "memory_is_causal")
        arguments = dict(zip(names, args, strict=False)) | kwargs
        _check_mask("tgt_mask", arguments.get("tgt_mask"), tgt)
        return streamed(tgt, memory=memory, **arguments)

    def mixers(
        self,
        *,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> tuple[AttentionMixer, ...]:
        _check_streamable(self.self_attn, tgt_key_padding_mask)
        if memory_mask is not None or memory_is_causal:
            raise ValueError(
                "memory_mask and memory_is_causal join target and memory tokens, which a streamed layer cannot honour; leave them out"
            )
        return (self.self_attn.mixer(tgt_mask, tgt_is_causal),)

    def forward(
        self, tgt: Tensor, memory: Tensor, tgt_mask: Tensor | None = None, memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None, memory_key_padding_mask: Tensor | None = None, tgt_is_causal: bool = False,
        memory_is_causal: bool = False, *, mix=None,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            out, _ = self.self_attn(x, x, x, key_padding_mask=tgt_key_padding_mask, attn_mask=tgt_mask, is_causal=tgt_is_causal, mix=mix)
            return self.dropout1(out)

        def recall(x: Tensor) -> Tensor:
            return self._mha_block(x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)

        parts = (attend, self.norm1), (recall, self.norm2), (self._ff_block, self.norm3)
        return _residual(tgt, parts, self.norm_first)

    def example(self, tokens: int) -> tuple[Tensor, dict[str, Any]]:
        weight = self.linear1.weight
        return _example(weight, tokens), {"memory": _example(weight, 4), "tgt_is_causal": True}


def _residual(x: Tensor, parts: tuple[tuple[Callable[[Tensor], Tensor], nn.Module], ...], norm_first: bool) -> Tensor:
    """Figure 1 of arXiv:2002.04745: ``x + part(norm(x))``, or ``norm(x + part(x))``."""
    for part, norm in parts:
        x = x + part(norm(x)) if norm_first else norm(x + part(x))
    return x


def _check_streamable(attention: MultiheadAttention, key_padding_mask: Tensor | None) -> None:
    if not attention.batch_first:
        raise ValueError("a streamed layer takes [B, T, E]: make it with batch_first=True")
    if paddings(key_padding_mask) is not None:
        raise ValueError(
            "padding cannot be honoured in a streamed layer: pack the documents into one row and give cu_seqlens to each layer, or "
            "pad at the end, causally, and leave the padding mask out"
        )


def _check_mask(name: str, mask: Tensor | None, x: Tensor) -> None:
    if mask is not None and mask.shape[-2:] != (x.shape[1], x.shape[1]):
        raise ValueError(f"{name} must be [..., {x.shape[1]}, {x.shape[1]}] for {x.shape[1]} tokens, found shape {list(mask.shape)}")


def _example(weight: Tensor, tokens: int) -> Tensor:
    return torch.randn(1, tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
