"""All-to-all attention (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509): from a part of the tokens with all heads to all of
the group's tokens with a part of the heads, and back.

Query heads are cut evenly, whatever their number; a kv head goes to every rank whose query heads read it, and the gradients of its
replicas are summed at home, wide, in rank order. What is done between the two exchanges is another way: by oneself where the group has
the whole sequence, a ring or travelling queries over several groups otherwise (2-D). With N tokens over P ranks that divide H and K:

    forward    (H (D + Dv) + K (D + Dv)) b  (N / P) (P - 1) / P          backward    the same

and with K < P, so that each rank has one kv head:

    forward    (H (D + Dv) / P + (D + Dv)) b  N (P - 1) / P          backward    (H (D + Dv) / P b + (D + Dv) w)  N (P - 1) / P
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtrain.parallel.exchange import Arrived, to_shares, to_tokens
from longtrain.parallel.layout import total
from longtrain.parallel.pieces import Spans, attend, attend_vjp, empty, wide_zeros
from longtrain.parallel.ranks import Ranks
from longtrain.parallel.way import Way


@dataclass(frozen=True, slots=True)
class Alone:
    """The way that needs nobody: this rank has all that its queries see, at `spans`."""

    spans: Spans

    def forward(self, mixer, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, lse = empty(q, v)
        attend(mixer, q, self.spans, k, v, self.spans, out, lse, with_sinks=True, fresh=True)
        out = out.to(q.dtype)
        return out, (q, k, v, out, lse)

    def backward(
        self, mixer, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = map(wide_zeros, (q, k, v))
        attend_vjp(mixer, dout, q, out, lse, self.spans, k, v, self.spans, dq=dq, dk=dk, dv=dv, with_sinks=True)
        return dq, dk, dv


@dataclass(frozen=True, slots=True)
class Heads:
    """Which heads each rank of a group takes: query heads ``[H r / P, H (r + 1) / P)`` and the kv heads that they read."""

    query_heads: int
    kv_heads: int
    ranks: int

    def __post_init__(self) -> None:
        if self.ranks > self.query_heads:
            raise ValueError(
                f"{self.query_heads} query heads cannot be dealt to {self.ranks} ranks: let heads go to at most {self.query_heads} ranks "
                "and give the others to the ring (cp_ulysses x cp_ring)"
            )

    def of_queries(self, rank: int) -> slice:
        return slice(self.query_heads * rank // self.ranks, self.query_heads * (rank + 1) // self.ranks)

    def of_keys(self, rank: int) -> slice:
        heads, group = self.of_queries(rank), self.query_heads // self.kv_heads
        return slice(heads.start // group, (heads.stop - 1) // group + 1)

    def runs(self, rank: int) -> list[tuple[int, slice, slice]]:
        """A rank's calls of attention, each with as many query heads for every kv head: (first query head, query heads, kv heads)."""
        heads, group, first_kv = self.of_queries(rank), self.query_heads // self.kv_heads, self.of_keys(rank).start
        inner = slice(-(-heads.start // group) * group, heads.stop // group * group)  # whole groups
        if inner.start > inner.stop:
            edges = [heads.start, heads.stop]
        else:
            edges = sorted({heads.start, inner.start, inner.stop, heads.stop})
        runs = []
        for a, b in zip(edges, edges[1:], strict=False):
            kv = slice(a // group - first_kv, (b - 1) // group + 1 - first_kv)
            runs.append((a, slice(a - heads.start, b - heads.start), kv))
        return runs

    def to_heads(
        self, ranks: Ranks, spans: Sequence[Spans], what: str, queries: Sequence[Tensor], keys: Sequence[Tensor] = ()
    ) -> Arrived:
        """Start ``[B, tokens of this rank, heads, ...]`` -> ``[B, tokens of all, this rank's heads, ...]``, in the order of positions.

        `queries` have a query's heads, `keys` a key's. `spans`: what each rank of the group holds of them.
        """
        return to_shares(ranks, spans, what, [(x, self.of_queries) for x in queries] + [(x, self.of_keys) for x in keys])

    def to_tokens(
        self, ranks: Ranks, spans: Sequence[Spans], what: str, queries: Sequence[Tensor], keys: Sequence[Tensor] = ()
    ) -> Arrived:
        """Start the way back. Keys' heads that several ranks had are summed."""
        tensors = [(x, self.of_queries) for x in queries] + [(x, self.of_keys) for x in keys]
        of_keys = range(len(queries), len(tensors))
        write = to_tokens(ranks, spans, what, tensors, summed=of_keys)

        def wait() -> list[Tensor]:
            held, wholes = total(spans[ranks.rank]), []
            for i, (x, _) in enumerate(tensors):
                heads = self.kv_heads if i in of_keys else self.query_heads
                new = x.new_zeros if i in of_keys else x.new_empty
                wholes.append(new(x.shape[0], held, heads, *x.shape[3:]))
            write(wholes)
            return wholes

        return wait

    @property
    def replicated(self) -> bool:
        """Whether some kv head is with several ranks."""
        return sum(_length(self.of_keys(rank)) for rank in range(self.ranks)) > self.kv_heads


@dataclass(frozen=True, slots=True)
class AllToAll:
    """Attention over `ranks` that hold `spans`, by heads; `inner` is the way over all their tokens with this rank's heads."""

    ranks: Ranks
    spans: tuple[Spans, ...]
    heads: Heads
    inner: Way

    def forward(self, mixer, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, k, v = self.heads.to_heads(self.ranks, self.spans, "qkv", (q,), (k, v))()
        outs, saved = [], []
        for first, of_q, of_k in self.heads.runs(self.ranks.rank):
            out, of_run = self.inner.forward(mixer.from_head(first), q[:, :, of_q], k[:, :, of_k], v[:, :, of_k])
            outs.append(out)
            saved += of_run
        (out,) = self.heads.to_tokens(self.ranks, self.spans, "out", (torch.cat(outs, dim=2),))()
        return out, tuple(saved)

    def backward(self, mixer, dout: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        runs, dtype = self.heads.runs(self.ranks.rank), dout.dtype
        (dout,) = self.heads.to_heads(self.ranks, self.spans, "dout", (dout,))()
        each = len(saved) // len(runs)
        grads = [
            self.inner.backward(mixer.from_head(first), dout[:, :, of_q], *saved[i * each : (i + 1) * each])
            for i, (first, of_q, _) in enumerate(runs)
        ]
        dq, dk, dv = (torch.cat(parts, dim=2) for parts in zip(*grads, strict=True))
        if self.heads.replicated:  # their sums are wide; without replicas the gradients are final, and as wide as the keys
            (dq,) = self.heads.to_tokens(self.ranks, self.spans, "dq", (dq.to(dtype),))()
            return dq, *self.heads.to_tokens(self.ranks, self.spans, "dkv", (), (dk, dv))()
        return tuple(self.heads.to_tokens(self.ranks, self.spans, "dqkv", (dq.to(dtype),), (dk.to(dtype), dv.to(dtype)))())


def _length(part: slice) -> int:
    return part.stop - part.start
