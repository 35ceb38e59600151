"""longtrain's attention under transformers' `AttentionInterface`, and the mixer that streams it.

A model given ``attn_implementation="longtrain"`` calls `longtrain_attention` with a `Mask`. In a streamed layer that mask carries `mix`,
and the call becomes the streaming engine's; otherwise the op is called directly, with a KV cache as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from longtrain.hf.mask import Mask
from longtrain.ops.attention import attention, attention_backward
from longtrain.ops.mixers import AttentionMixer, nth_seed
from longtrain.span import Span
from longtrain.stream.carry import KVCarry


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What one call of the attention interface asks for, beside its tensors and its mask."""

    scale: float | None
    softcap: float | None
    dropout: float
    sinks: bool
    kernel_fallback: str = "error"
    """As in `longtrain.ops.attention`: what the attention module has as an attribute of this name."""


@torch.compiler.disable(reason="what streams is not compiled, the pieces around it are")
def longtrain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **unused,
) -> tuple[Tensor, None]:
    """The attention interface of transformers: query ``[B, H, T, D]``, key ``[B, K, S, D]``, value ``[B, K, S, Dv]`` -> ``[B, T, H, Dv]``.

    Without a mask the module's `is_causal` counts. Raises ValueError for masks and biases given as tensors.
    """
    if isinstance(attention_mask, Tensor) or position_bias is not None:
        what = "a position bias" if position_bias is not None else f"a mask tensor of shape {list(attention_mask.shape)}"
        raise ValueError(f'{type(module).__name__} calls attention with {what}, which attn_implementation="longtrain" cannot honour; '
                         "give attention_mask as [batch, tokens], or use another implementation")
    q_BTHD, k_BSKD, v_BSKD = (_autocast(x).transpose(1, 2) for x in (query, key, value))
    fallback = getattr(module, "kernel_fallback", "error")
    options = Options(scale=scaling, softcap=softcap, dropout=dropout, sinks=s_aux is not None, kernel_fallback=fallback)
    if options.sinks:
        q_BTHD = with_sinks(q_BTHD, s_aux)
        options = replace(options, scale=query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
        attention_mask = Mask.plain(q_BTHD.shape[1], k_BSKD.shape[1], causal=causal, window=window)
    attention_mask.check()
    if attention_mask.mix is not None:
        return attention_mask.mix(module, q_BTHD, k_BSKD, v_BSKD, options), None
    mask = packed(attention_mask, cu_seq_lens_q, cu_seq_lens_k)
    mixer = MaskedAttention.make(mask, options, draw_seed(options))
    return mixer.attend(mask.queries, mask.keys, q_BTHD, k_BSKD, v_BSKD)[0], None


def _autocast(x: Tensor) -> Tensor:
    """As autocast hands it to torch's own attention: rotary positions come in float32, values in a half type."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x


def packed(mask: Mask, cu_q: Tensor | None, cu_k: Tensor | None) -> Mask:
    """The mask with the document boundaries that flash-attention keyword arguments name, if they do."""
    if cu_q is None and cu_k is None:
        return mask
    if cu_q is None or cu_k is None or not torch.equal(cu_q, cu_k):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be given together and be the same for self-attention")
    return mask.with_documents(cu_q)


def draw_seed(options: Options) -> int | None:
    """A seed for the dropout of one call, from torch's generator; None without dropout, which then draws nothing."""
    return int(torch.randint(2**62, ())) if options.dropout else None


def with_sinks(q_BTHD: Tensor, sinks_H: Tensor) -> Tensor:
    """Every query with its head's sink logit as one more feature: so it is token-wise, and its gradient too."""
    return torch.cat([q_BTHD, sinks_H.to(q_BTHD.dtype)[:, None].expand(*q_BTHD.shape[:3], 1)], dim=-1)


@dataclass(frozen=True, kw_only=True)
class MaskedAttention:
    """Softmax attention under a `Mask`: a mixer as in `longtrain.ops.mixers`, for batches whose rows differ.

    Inputs as `AttentionMixer`'s; with `sinks` the queries are ``[B, T, H, D + 1]``, the sink logit last.
    """

    mask: Mask
    sinks: bool
    base: AttentionMixer

    shared = ()

    @classmethod
    def make(cls, mask: Mask, options: Options, dropout_seed: int | None) -> MaskedAttention:
        base = AttentionMixer(
            causal=mask.causal,
            window_size=mask.window,
            softcap=options.softcap,
            scale=options.scale,
            dropout_p=float(options.dropout),
            dropout_seed=dropout_seed,
            kernel_fallback=options.kernel_fallback,
        )
        return cls(mask=mask, sinks=options.sinks, base=base)

    def simplest(self) -> MaskedAttention | AttentionMixer:
        """`AttentionMixer`, where that says it all: no sinks, no padding, and documents in one row at most."""
        if self.sinks or len(self.mask.rows) > 1:
            return self
        (row,) = self.mask.rows
        if row.is_plain:
            return self.base
        return self

    @property
    def causal(self) -> bool:
        return self.base.causal

    def __call__(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        whole = Span(0, q_BTHD.shape[1])
        return self.attend(whole, whole, q_BTHD, k_BTKD, v_BTKD)[0]

    def keys_for(self, queries: Span) -> Span:
        """The smallest span of keys that causal `queries` of any row can see."""
        return Span(min(replace(self.base, documents=row.documents).keys_for(queries).start for row in self.mask.rows), queries.stop)

    def split(self, q_BTHD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries and sink logits ``[H]``."""
        return (q_BTHD[..., :-1], q_BTHD[0, 0, :, -1]) if self.sinks else (q_BTHD, None)

    def calls(self, batch: int, queries: Span, keys: Span) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
        """The calls of the op that make up this one: (batch rows, keys among those given, keyword arguments)."""
        if self.mask.is_plain:
            yield slice(None), slice(None), self.base.arguments(queries, keys)
            return
        for b in range(batch):
            row = self.mask.row(b)
            seen = keys & row.keys
            mixer = replace(self.base, documents=row.documents, dropout_seed=nth_seed(self.base.dropout_seed, b))
            yield slice(b, b + 1), seen.slice(keys.start), mixer.arguments(queries, seen)

    def attend(
        self, queries: Span, keys: Span, q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, *, with_sinks: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Differentiable attention of the queries of one span on the keys of another: out and LSE."""
        q_BTHD, sinks_H = self.split(q_BTHD)
        parts = [
            attention(
                q_BTHD[rows],
                k_BSKD[rows, seen],
                v_BSKD[rows, seen],
                **arguments,
                sink_logits=sinks_H if with_sinks else None,
                return_lse=True,
            )
            for rows, seen, arguments in self.calls(q_BTHD.shape[0], queries, keys)
        ]
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))

    def attend_vjp(
        self, queries: Span, keys: Span, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor,
        *, dk: Tensor, dv: Tensor, with_sinks: bool = True, delta: Tensor | None = None,
    ) -> Tensor:
        """As `AttentionMixer.attend_vjp`. The gradient of the sinks, in dq's last feature, is made by the block `with_sinks`."""
        dq = torch.zeros_like(q)
        q, sinks_H = self.split(q)
        if delta is not None:
            out = dout.new_zeros(()).expand_as(dout)
        for rows, seen, arguments in self.calls(q.shape[0], queries, keys):
            dq[rows, ..., : q.shape[-1]] += attention_backward(
                dout[rows], q[rows], k[rows, seen], v[rows, seen], out[rows], lse[rows], dk=dk[rows, seen], dv=dv[rows, seen],
                dlse=None if delta is None else -delta[rows], **arguments,
            )
        if sinks_H is not None and with_sinks:
            # dsink_bth = -exp(sink_h - lse_bth) (dout_bth . out_bth): the sink's probability times (0 - delta).
            delta = (dout.to(lse.dtype) * out).sum(-1) if delta is None else delta
            dq[..., -1] = (-torch.exp(sinks_H.to(lse.dtype) - lse) * delta).to(dq.dtype)
        return dq

    def make_carry(self, spans: Sequence[Span]) -> KVCarry:
        return KVCarry(self, spans)

    def with_documents(self, cu_seqlens: Sequence[int]) -> MaskedAttention:
        """As `AttentionMixer.with_documents`."""
        return replace(self, mask=self.mask.with_documents(torch.tensor(cu_seqlens)))

    def with_seed(self, seed: int) -> MaskedAttention:
        return replace(self, base=self.base.with_seed(seed))

    def from_head(self, head: int) -> MaskedAttention:
        """As `AttentionMixer.from_head`."""
        return replace(self, base=self.base.from_head(head))

    @property
    def shows_all_before(self) -> bool:
        """As `AttentionMixer.shows_all_before`."""
        return self.mask.is_plain and self.base.shows_all_before

    def with_shared(self) -> MaskedAttention:
        return self

    def by_group(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Iterator[tuple[slice, MaskedAttention, tuple[Tensor, ...]]]:
        """One kv head at a time, with its query heads, as `AttentionMixer.by_group`."""
        for heads, base, inputs in self.base.by_group(q_BTHD, k_BTKD, v_BTKD):
            yield heads, replace(self, base=base), inputs
