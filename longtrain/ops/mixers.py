"""Sequence mixers as data: what a layer's token-mixing step is, apart from how it is carried out.

Called, a mixer runs the whole sequence at once. The streaming engine reads the same description to run it chunk by chunk (when it
is causal) or by head and channel group (when it sees the future).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from longtrain.ops.attention import attention, attention_backward
from longtrain.ops.long_conv import direct_flops, long_conv, long_conv_backward, transform_flops
from longtrain.span import Layout, Span


def nth_seed(seed: int | None, number: int) -> int | None:
    """The dropout seed of one of many (a layer, a row of the batch) that share `seed`; 2^64 / golden ratio sets them far apart, whatever
    it is."""
    return None if seed is None else (seed + number * 0x9E3779B97F4A7C15) % 2**63


@dataclass(frozen=True, kw_only=True)
class AttentionMixer:
    """Softmax attention; fields as in `longtrain.ops.attention`, over the whole sequence.

    Inputs ``q [B, T, H, D]``, ``k [B, T, K, D]``, ``v [B, T, K, Dv]``; output ``[B, T, H, Dv]``.
    """

    causal: bool = True
    window_size: tuple[int, int] = (-1, -1)
    sink_tokens: int = 0
    softcap: float | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    dropout_seed: int | None = None
    head_offset: int = 0
    documents: Layout | None = None
    backend: str = "auto"
    partials: str = "bf16"
    kernel_fallback: str = "error"

    def __call__(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        whole = Span(0, q_BTHD.shape[1])
        return attention(q_BTHD, k_BTKD, v_BTKD, **self.arguments(whole, whole))

    def arguments(self, queries: Span, keys: Span) -> dict[str, Any]:
        """Keyword arguments of `attention` and `attention_backward` for the queries of one span against the keys of another."""
        arguments = {
            "causal": self.causal,
            "window_size": self.window_size,
            "q_offset": queries.start,
            "k_offset": keys.start,
            "sink_tokens": self.sink_tokens,
            "softcap": self.softcap,
            "scale": self.scale,
            "dropout_p": self.dropout_p,
            "dropout_seed": self.dropout_seed,
            "head_offset": self.head_offset,
            "backend": self.backend,
            "partials": self.partials,
            "kernel_fallback": self.kernel_fallback,
        }
        if self.documents is not None and len(self.documents.edges) > 2:
            cu_q, cu_k = self.documents.edges_within(queries, keys)
            arguments["cu_seqlens_q"] = torch.tensor(cu_q, dtype=torch.int32)
            arguments["cu_seqlens_k"] = torch.tensor(cu_k, dtype=torch.int32)
        return arguments

    def attend(
        self, queries: Span, keys: Span, q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, *, with_sinks: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Output and LSE of the queries of one span on the keys of another. `with_sinks`: for mixers that have them, this block's."""
        return attention(q_BTHD, k_BSKD, v_BSKD, **self.arguments(queries, keys), return_lse=True)

    def attend_vjp(
        self, queries: Span, keys: Span, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor,
        *, dk: Tensor, dv: Tensor, with_sinks: bool = True, delta: Tensor | None = None,
    ) -> Tensor:
        """Gradient of q; adds into the wide dk, dv. `out` and `lse` are the global ones.

        Where `out` is not at hand (queries that came from another rank), ``delta [B, T, H] = sum(dout * out)`` does, as it is all that is
        made of it: the op then gets an output of zeros, and -delta as the gradient of the LSE.
        """
        if delta is not None:
            out = dout.new_zeros(()).expand_as(dout)
        dlse = None if delta is None else -delta
        return attention_backward(dout, q, k, v, out, lse, dk=dk, dv=dv, dlse=dlse, **self.arguments(queries, keys))

    def from_head(self, head: int) -> AttentionMixer:
        """The mixer of a run of heads that begins at `head`."""
        return replace(self, head_offset=self.head_offset + head)

    def with_documents(self, cu_seqlens: Sequence[int]) -> AttentionMixer:
        """The same with document boundaries added."""
        edges = {*cu_seqlens, *(() if self.documents is None else self.documents.edges)}
        return replace(self, documents=Layout(cu_seqlens[-1], tuple(sorted(edges))))

    def with_seed(self, seed: int) -> AttentionMixer:
        return replace(self, dropout_seed=seed)

    @property
    def shows_all_before(self) -> bool:
        """Whether a query sees every key before it alike, so that where they stand makes no difference."""
        one_document = self.documents is None or len(self.documents.edges) == 2
        return one_document and self.window_size[0] < 0 and self.dropout_p == 0

    def keys_for(self, queries: Span) -> Span:
        """The smallest span of keys that causal `queries` can see, by window and documents."""
        start = self.documents.first_visible(queries.start) if self.documents is not None else 0
        if self.window_size[0] >= 0 and self.sink_tokens == 0:
            start = max(start, queries.start - self.window_size[0])
        return Span(start, queries.stop)

    shared = ()
    """No tensors beside q, k, v take part."""

    def with_shared(self) -> AttentionMixer:
        return self

    def by_group(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Iterator[tuple[slice, AttentionMixer, tuple[Tensor, ...]]]:
        """One kv head at a time, with its query heads: (slice of the output's axis 2, mixer, inputs)."""
        ratio = q_BTHD.shape[2] // k_BTKD.shape[2]
        for kv_head in range(k_BTKD.shape[2]):
            heads, kv = slice(kv_head * ratio, (kv_head + 1) * ratio), slice(kv_head, kv_head + 1)
            yield heads, self.from_head(heads.start), (q_BTHD[:, :, heads], k_BTKD[:, :, kv], v_BTKD[:, :, kv])


@dataclass(frozen=True, kw_only=True)
class LongConvMixer:
    """Long convolution; fields as in `longtrain.ops.long_conv`. Inputs ``u, gate_in, gate_out [B, T, E]``; output ``[B, T, E]``."""

    filter: Tensor
    skip: Tensor
    causal: bool = True
    documents: Layout | None = None
    backend: str = "auto"
    group_channels: int = 32

    def __call__(self, u_BTE: Tensor, gate_in_BTE: Tensor | None = None, gate_out_BTE: Tensor | None = None) -> Tensor:
        return long_conv(u_BTE, self.filter, self.skip, gate_in_BTE, gate_out_BTE, **self._options())

    def _options(self) -> dict[str, Any]:
        packed = self.documents is not None and len(self.documents.edges) > 2
        cu_seqlens = torch.tensor(self.documents.edges, dtype=torch.int32) if packed else None
        return {"causal": self.causal, "cu_seqlens": cu_seqlens, "backend": self.backend}

    def mix_into(self, out_BTE: Tensor, u_BTE: Tensor, gate_in_BTE: Tensor | None = None, gate_out_BTE: Tensor | None = None) -> None:
        """Writes the output to a group of channels of a larger tensor."""
        long_conv(u_BTE, self.filter, self.skip, gate_in_BTE, gate_out_BTE, **self._options(), out=out_BTE)

    def vjp_into(self, dout_BTE: Tensor, inputs: Sequence[Tensor], dinputs: Sequence[Tensor], dshared: Sequence[Tensor]) -> None:
        """Writes the gradients of inputs and of `shared`, without running the forward again."""
        wide = reduce(torch.promote_types, (x.dtype for x in (*inputs, *self.shared)), torch.float32)
        sums = [d if d.dtype == wide and d.is_contiguous() else torch.empty(d.shape, dtype=wide, device=d.device) for d in dshared]
        names = ("u", "gate_in", "gate_out")[: len(inputs)]
        given, gradients = dict(zip(names, inputs)), {f"d{name}": d for name, d in zip(names, dinputs)}
        long_conv_backward(dout_BTE, k=self.filter, skip=self.skip, **given, **self._options(), **gradients, dk=sums[0], dskip=sums[1])
        for d, found in zip(dshared, sums, strict=True):
            if found is not d:
                d.copy_(found)

    def work(self, u_BTE: Tensor, *gates: Tensor) -> dict[str, Callable[..., float]]:
        """FLOP of ``(tokens, backward=)`` for a batch of one, by the ways there are: the quicker one counts (`longtrain.planner`)."""
        sizes = dict(channels=u_BTE.shape[-1], taps=self.filter.shape[-1])
        return {"convolution, direct": partial(direct_flops, **sizes), "convolution, transformed": partial(transform_flops, **sizes)}

    def streams_by_span(self, chunk_tokens: int) -> bool:
        """Whether it is cheaper with the inputs before a chunk at hand than by channel group: at most a chunk of them."""
        return self.causal and self.filter.shape[1] - 1 <= chunk_tokens

    def keys_for(self, queries: Span) -> Span:
        """The smallest span of inputs that the outputs of `queries` depend on, when causal."""
        start = self.documents.first_visible(queries.start) if self.documents is not None else 0
        return Span(max(start, queries.start - self.filter.shape[1] + 1), queries.stop)

    def carried(self, mix, u_BTE: Tensor, gate_in_BTE: Tensor | None = None, gate_out_BTE: Tensor | None = None) -> Tensor:
        """The call with what is token-local in it, the gates, outside of `mix`, whose query is empty: its carry has all that it needs."""
        v_BTE = u_BTE if gate_in_BTE is None else u_BTE * gate_in_BTE
        y_BTE = mix(v_BTE[..., :0], v_BTE)
        return y_BTE if gate_out_BTE is None else y_BTE * gate_out_BTE

    @property
    def shared(self) -> tuple[Tensor, Tensor]:
        """The tensors beside the inputs that take part, and receive gradients."""
        return self.filter, self.skip

    def with_shared(self, filter: Tensor, skip: Tensor) -> LongConvMixer:
        return replace(self, filter=filter, skip=skip)

    def by_group(self, *inputs_BTE: Tensor) -> Iterator[tuple[slice, LongConvMixer, tuple[Tensor, ...]]]:
        """`group_channels` channels at a time, or more to the end of a head: (slice of the output's axis 2, mixer, inputs)."""
        share = inputs_BTE[0].shape[2] // self.filter.shape[0]
        step = -(-self.group_channels // share) * share
        for start in range(0, inputs_BTE[0].shape[2], step):
            channels = slice(start, start + step)
            mixer = self.with_shared(self.filter[start // share : (start + step) // share], self.skip[channels])
            yield channels, mixer, tuple(x[:, :, channels] for x in inputs_BTE)
