"""`torch.nn.MultiheadAttention` on longtrain's attention: no probabilities, and masks as data wherever they can be.

A mask tensor ``[T, S]`` is read for what it is, a band next to the diagonal (causal, windowed, or everything); padding must be at the
ends of a row. What is neither is refused, never approximated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtrain.ops.attention import attention
from longtrain.ops.mixers import AttentionMixer
from longtrain.span import Layout, Span


class MultiheadAttention(nn.MultiheadAttention):
    """As `torch.nn.MultiheadAttention`: same constructor and state; `need_weights` is off by default and cannot be turned on.

    Attention dropout is counter-based (its seed comes from torch's generator), so its masks are not torch's. A query that sees no key
    gives 0 before the output projection, where torch gives NaN. Raises ValueError for `add_bias_kv`, `need_weights=True`, nested tensors
    and masks that are no band.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cu_seqlens: Tensor | None = None,
        mix=None,
    ) -> tuple[Tensor, None]:
        """``[B, T, E]`` (``[T, B, E]`` without batch_first, ``[T, E]`` unbatched) and None.

        `is_causal` alone suffices, without a mask. `cu_seqlens [documents + 1]`: documents packed into one row of self-attention.
        `mix`: callable of (q, k, v) that attends in this module's place, as in `longtrain.nn.Attention`.
        """
        if need_weights:
            raise ValueError("need_weights=True: attention probabilities [B, H, T, S] are never formed; leave need_weights off")
        if self.bias_k is not None:
            raise ValueError("add_bias_kv=True cannot be honoured: use torch.nn.MultiheadAttention for it")
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "nested tensors are not taken: pack the documents into one row and give cu_seqlens; in torch.nn.TransformerEncoder "
                "set enable_nested_tensor=False"
            )
        batched = query.ndim == 3
        query, key, value = (self._batch_first(x, batched) for x in (query, key, value))
        q_BTHD, k_BSHD, v_BSHD = (x.unflatten(-1, (self.num_heads, -1)) for x in self._projected(query, key, value))
        if mix is None:
            mixer = self.mixer(attn_mask, is_causal, cu_seqlens, tokens=(query.shape[1], key.shape[1]))
            out_BTHD = self._attend(mixer, paddings(key_padding_mask, batched), q_BTHD, k_BSHD, v_BSHD)
        else:
            out_BTHD = mix(q_BTHD, k_BSHD, v_BSHD)
        out = self.out_proj(out_BTHD.flatten(-2))
        if not batched:
            return out[0], None
        return (out if self.batch_first else out.transpose(0, 1)), None

    def mixer(
        self, attn_mask: Tensor | None, is_causal: bool, cu_seqlens: Tensor | None = None, *, tokens: tuple[int, int] | None = None
    ) -> AttentionMixer:
        """What these arguments ask for; the dropout's seed is drawn here. `tokens`: numbers of queries and keys, to check a mask's
        shape."""
        causal, window = read_mask(attn_mask, is_causal, tokens)
        dropout = self.dropout if self.training else 0.0
        documents = None
        if cu_seqlens is not None:
            count = int(cu_seqlens[-1]) if tokens is None else tokens[0]
            if tokens is not None and tokens[0] != tokens[1]:
                raise ValueError(f"cu_seqlens is for self-attention, found {tokens[0]} queries and {tokens[1]} keys")
            documents = Layout.make(count, cu_seqlens)
        return AttentionMixer(
            causal=causal, window_size=window, dropout_p=dropout, documents=documents,
            dropout_seed=int(torch.randint(2**62, ())) if dropout else None,
        )

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim and query is key and key is value:
            return F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = self.in_proj_weight.chunk(3) if self._qkv_same_embed_dim else separate
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _attend(self, mixer: AttentionMixer, rows: list[Span] | None, q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        # add_zero_attn's key has score 0 and value 0: one more 1 in the softmax's denominator, which is what a sink logit of 0 is.
        sink_logits = q_BTHD.new_zeros(self.num_heads) if self.add_zero_attn else None
        queries, keys = Span(0, q_BTHD.shape[1]), Span(0, k_BSHD.shape[1])
        if rows is None:
            return attention(q_BTHD, k_BSHD, v_BSHD, **mixer.arguments(queries, keys), sink_logits=sink_logits)
        outs = []
        for b, seen in enumerate(rows):
            arguments = mixer.arguments(queries, seen)
            if mixer.dropout_seed is not None:
                arguments["dropout_seed"] = int(torch.randint(2**62, ()))
            outs.append(attention(q_BTHD[b : b + 1], k_BSHD[b : b + 1, seen.slice()], v_BSHD[b : b + 1, seen.slice()], **arguments,
                                  sink_logits=sink_logits))
        return torch.cat(outs)


def read_mask(attn_mask: Tensor | None, is_causal: bool, tokens: tuple[int, int] | None = None) -> tuple[bool, tuple[int, int]]:
    """(causal, window) of a mask in torch's sense: True, or -inf, hides. Positions count from the first query and the first key.

    Raises ValueError for biases, for masks that differ from row to row or head to head, and for those that are no band.
    """
    if attn_mask is None:
        return is_causal, (-1, -1)
    hidden = attn_mask if attn_mask.dtype == torch.bool else attn_mask <= torch.finfo(attn_mask.dtype).min
    if attn_mask.dtype != torch.bool and bool(((attn_mask != 0) & ~hidden).any()):
        raise ValueError("attn_mask adds finite biases to the scores, which cannot be honoured; only 0 and -inf can (or True and False)")
    if hidden.ndim == 3 and bool((hidden != hidden[:1]).any()):
        raise ValueError("attn_mask [B H, T, S] differs between rows or heads, which cannot be honoured: give padding as key_padding_mask, "
                         "documents as cu_seqlens")
    hidden = hidden[0] if hidden.ndim == 3 else hidden
    if hidden.ndim != 2 or (tokens is not None and tuple(hidden.shape) != tokens):
        raise ValueError(f"attn_mask must be [T, S]{'' if tokens is None else f' = {list(tokens)}'}, found shape {list(attn_mask.shape)}")
    (T, S), seen_TS = hidden.shape, ~hidden
    # Row by row: the first and the last key seen, and whether they are those of one band with all keys between them.
    at_T, count_T = torch.arange(T, device=hidden.device), seen_TS.sum(1)
    first_T, last_T = seen_TS.byte().argmax(1), S - 1 - seen_TS.flip(1).byte().argmax(1)
    left, right = (int(reach.where(count_T > 0, -1).amax()) for reach in (at_T - first_T, last_T - at_T))
    band_first_T, band_last_T = (at_T - left).clamp(min=0), (at_T + right).clamp(max=S - 1)
    in_band_T = (count_T == 0) | ((first_T == band_first_T) & (last_T == band_last_T))
    differs_T = ~in_band_T | (count_T != (band_last_T - band_first_T + 1).clamp(min=0))
    if min(left, right) < 0 or bool(differs_T.any()):
        query = int(differs_T.byte().argmax())
        raise ValueError(
            f"attn_mask is no band next to the diagonal (query {query} sees {int(count_T[query])} keys from {int(first_T[query])} to "
            f"{int(last_T[query])}), which cannot be honoured: causal and windowed masks can, padding as key_padding_mask, documents "
            "as cu_seqlens"
        )
    if is_causal and right > 0:
        raise ValueError("is_causal=True and attn_mask shows keys after the query: give one of the two")
    return right == 0, (-1 if left >= T - 1 else left, -1 if right in (0, S - 1) else right)


def paddings(key_padding_mask: Tensor | None, batched: bool = True) -> list[Span] | None:
    """Each row's keys that are not padding (True, or -inf), None where there is no padding. Raises ValueError for holes."""
    if key_padding_mask is None:
        return None
    mask = key_padding_mask if batched else key_padding_mask[None]
    valid = ~mask if mask.dtype == torch.bool else mask == 0
    if bool(valid.all()):
        return None
    rows = []
    for b, row in enumerate(valid.cpu()):
        places = row.nonzero()[:, 0]
        span = Span(int(places[0]), int(places[-1]) + 1) if len(places) else Span(0, 0)
        if len(span) != len(places):
            raise ValueError(
                f"key_padding_mask of row {b} has padding inside ({len(places)} keys between {span.start} and {span.stop}), which "
                "cannot be honoured: pad at the ends, or pack documents and give cu_seqlens"
            )
        rows.append(span)
    return rows
