"""All-to-all attention (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509): from a part of the tokens with all heads to all of
the group's tokens with a part of the heads, and back.

Query heads are cut evenly, whatever their number; a kv head goes to every rank whose query heads read it, and the gradients of its
replicas are summed at home, wide, in rank order. What is done between the two exchanges is another way: by oneself where the group has
the whole sequence, a ring or travelling queries over several groups otherwise (2-D). A rank's heads go in rounds (`exchange.py`), a kv
head with the first of its query heads, its gradient with the last. With N tokens over P ranks that divide H and K, where the gradients
of what was attended to need q, k and v there a second time, with the LSE and delta (`way.py`) of 4 bytes each:

    forward     (H ((D + Dv) b + w) + K (D + Dv) b)  (N / P) (P - 1) / P
    backward    (H ((2 D + Dv) b + 2 w) + 2 K (D + Dv) b)  (N / P) (P - 1) / P

With K < P, so that each rank has one kv head, P in place of K, and the gradients of keys as wide as their sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtrain.parallel.exchange import ROUNDS, Arrived, Rounds, to_shares, to_tokens
from longtrain.parallel.layout import total
from longtrain.parallel.pieces import Spans, attend, attend_vjp, empty, wide_zeros
from longtrain.parallel.ranks import Ranks
from longtrain.parallel.way import Way


@dataclass(frozen=True, slots=True)
class Alone:
    """The way that needs nobody: this rank has all that its queries see, at `spans`."""

    spans: Spans

    def attend(self, mixer, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = empty(q, v)
        attend(mixer, q, self.spans, k, v, self.spans, out, lse, with_sinks=True, fresh=True)
        return out.to(q.dtype), lse

    def attend_vjp(
        self, mixer, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = map(wide_zeros, (q, k, v))
        attend_vjp(mixer, dout, q, None, lse, self.spans, k, v, self.spans, dq=dq, dk=dk, dv=dv, with_sinks=True, delta=delta)
        return dq, dk, dv


@dataclass(frozen=True, slots=True)
class Heads:
    """Which heads each rank of a group takes: query heads ``[H r / P, H (r + 1) / P)`` and the kv heads that they read."""

    query_heads: int
    kv_heads: int
    ranks: int
    keys_travel: bool = False
    """Whether keys go on from where they were sent: then no round cuts the query heads of a kv head apart, which would travel with each."""

    def __post_init__(self) -> None:
        if self.ranks > self.query_heads:
            raise ValueError(
                f"{self.query_heads} query heads cannot be dealt to {self.ranks} ranks: let heads go to at most {self.query_heads} ranks "
                "and give the others to the ring (cp_ulysses x cp_ring)"
            )

    def of_queries(self, rank: int, round: int | None = None) -> slice:
        """A rank's query heads, or those of a round."""
        start, stop = self.query_heads * rank // self.ranks, self.query_heads * (rank + 1) // self.ranks
        if round is None:
            return slice(start, stop)
        edges = (round, round + 1)
        if self.keys_travel:
            keys, group = self.of_keys(rank), self.query_heads // self.kv_heads
            of_keys = (keys.start + _length(keys) * edge // self.rounds for edge in edges)
            return slice(*(min(max(start, key * group), stop) for key in of_keys))
        return slice(*(start + (stop - start) * edge // self.rounds for edge in edges))

    def of_keys(self, rank: int, round: int | None = None) -> slice:
        """The kv heads that they read."""
        heads, group = self.of_queries(rank, round), self.query_heads // self.kv_heads
        return slice(heads.start // group, (heads.stop - 1) // group + 1)

    @property
    def rounds(self) -> int:
        fewest = min(_length(self.of_keys(rank)) for rank in range(self.ranks)) if self.keys_travel else self.query_heads // self.ranks
        return min(ROUNDS, fewest)

    def coming(self, rank: int, round: int) -> slice:
        """The kv heads that no earlier round of the rank reads."""
        keys = self.of_keys(rank, round)
        return slice(self.of_keys(rank, round - 1).stop if round else keys.start, keys.stop)

    def going(self, rank: int, round: int) -> slice:
        """The kv heads that this round reads or an earlier one, and no later one, and that have not gone before."""
        start, stop = (self.of_keys(rank, r).start if r < self.rounds else self.of_keys(rank).stop for r in (round, round + 1))
        return slice(start, stop)

    def runs(self, rank: int, round: int | None = None) -> list[tuple[int, slice, slice]]:
        """A rank's calls of attention, each with as many query heads for every kv head: (first query head, its query heads among those of
        the round, kv heads among those of the rank)."""
        heads, group, first_kv = self.of_queries(rank, round), self.query_heads // self.kv_heads, self.of_keys(rank).start
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

    def attend(self, mixer, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        heads, rounds = self.heads, self._rounds
        keys = [self._of_rank(x, x.dtype) for x in (k, v)]

        def work(round: int, q: Tensor, *coming: Tensor) -> tuple[Tensor, Tensor]:
            for whole, part in zip(keys, coming, strict=True):
                whole[:, :, self._among_own(heads.coming(self.ranks.rank, round))] = part
            made = [
                self.inner.attend(mixer.from_head(first), q[:, :, of_q], *(x[:, :, of_k] for x in keys))
                for first, of_q, of_k in heads.runs(self.ranks.rank, round)
            ]
            return tuple(torch.cat(parts, dim=2) for parts in zip(*made, strict=True))

        coming = rounds.start("qkv", [(q, heads.of_queries), (k, heads.coming), (v, heads.coming)])
        out, lse = rounds.finish([coming], work, "out", [(heads.of_queries, heads.query_heads)] * 2)
        return out, lse

    def attend_vjp(
        self, mixer, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, rounds, dtype = self.heads, self._rounds, dout.dtype
        keys, sums = [self._of_rank(x, x.dtype) for x in (k, v)], [self._of_rank(x, lse.dtype).zero_() for x in (k, v)]

        def work(round: int, q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, *coming: Tensor) -> tuple[Tensor, ...]:
            for whole, part in zip(keys, coming, strict=True):
                whole[:, :, self._among_own(heads.coming(self.ranks.rank, round))] = part
            dqs = []
            for first, of_q, of_k in heads.runs(self.ranks.rank, round):
                of_run, of_queries = [x[:, :, of_k] for x in keys], [x[:, :, of_q] for x in (lse, delta)]
                dq, *made = self.inner.attend_vjp(mixer.from_head(first), dout[:, :, of_q], q[:, :, of_q], *of_run, *of_queries)
                dqs.append(dq)
                for whole, part in zip(sums, made, strict=True):
                    whole[:, :, of_k] += part
            final = [x[:, :, self._among_own(heads.going(self.ranks.rank, round))] for x in sums]
            # Sums of replicas are wide; without replicas the gradients are final, and as wide as the keys.
            return torch.cat(dqs, dim=2).to(dtype), *(x if heads.replicated else x.to(dtype) for x in final)

        of_q, there, back = heads.of_queries, heads.coming, (heads.going, heads.kv_heads)
        coming = rounds.start("qkv and dout", [(q, of_q), (dout, of_q), (lse, of_q), (delta, of_q), (k, there), (v, there)])
        return tuple(rounds.finish([coming], work, "dqkv", [(of_q, heads.query_heads), back, back], summed=self._summed))

    _summed = (1, 2)
    """dk and dv: the heads of replicas."""

    @property
    def _rounds(self) -> Rounds:
        return Rounds(self.ranks, self.spans, self.heads.rounds)

    def _of_rank(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for this rank's kv heads of all tokens."""
        heads = self.heads.of_keys(self.ranks.rank)
        return x.new_empty(x.shape[0], sum(map(total, self.spans)), _length(heads), *x.shape[3:], dtype=dtype)

    def _among_own(self, heads: slice) -> slice:
        first = self.heads.of_keys(self.ranks.rank).start
        return slice(heads.start - first, heads.stop - first)


def _length(part: slice) -> int:
    return part.stop - part.start
