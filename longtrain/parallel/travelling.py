"""Travelling queries: keys, values and their gradients stay; queries go round, and what becomes of them follows one stop behind.

    forward    visit: (out_s, lse_s) of this rank's keys, merged with those of the ranks before
    backward   visit: dk, dv += ..., and dq_s of this rank's keys, added to those of the ranks before

In the backward pass ``delta = sum(dout * out)`` travels in place of the output. A rank receives, with b bytes an element and w of an
accumulator, N tokens over P ranks that all need all:

    forward    H (D b + (Dv + 1) w)  N (P - 1) / P          backward    H ((D + Dv) b + (D + 2) w)  N (P - 1) / P

It goes the other way round than a ring of keys: a causal query meets those before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longtrain.ops.attention import merge_attention
from longtrain.parallel.circulate import Route, added, circulate
from longtrain.parallel.pieces import Spans, attend, attend_vjp, empty, that_see, wide_zeros
from longtrain.parallel.ranks import Ranks


@dataclass(frozen=True, slots=True)
class TravellingQueries:
    """Attention over `ranks`: queries stand at `queries`, keys at `keys`, by default at the same."""

    ranks: Ranks
    queries: tuple[Spans, ...]
    keys: tuple[Spans, ...] | None = None

    def attend(self, mixer, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q ``[B, n, H, D]``, k, v ``[B, S, K, D]`` of this rank's n queries and S keys: out and LSE."""

        def visit(source: int, queries: Spans, cargo: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            made = empty(*cargo, v)
            attend(mixer, *cargo, queries, k, v, self._mine, *made, with_sinks=source == self.ranks.rank, fresh=True)
            return made

        out, lse = circulate(self.ranks, self._route(mixer), (q,), visit, lambda a, b: merge_attention(*a, *b), what=("q", "out"))
        return out.to(q.dtype), lse

    def attend_vjp(
        self, mixer, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dk, dv = map(wide_zeros, (k, v))
        return self.add_vjp(mixer, dout, q, k, v, lse, delta, dk, dv), dk, dv

    def add_vjp(
        self, mixer, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor
    ) -> Tensor:
        """dq, wide; adds into dk, dv."""

        def visit(source: int, queries: Spans, cargo: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            q_s, dout_s, lse_s, delta_s = cargo
            dq = wide_zeros(q_s)
            attend_vjp(
                mixer, dout_s, q_s, None, lse_s, queries, k, v, self._mine,
                dq=dq, dk=dk, dv=dv, with_sinks=source == self.ranks.rank, delta=delta_s,
            )
            return (dq,)

        (dq,) = circulate(self.ranks, self._route(mixer), (q, dout, lse, delta), visit, added, what=("q", "dq"))
        return dq

    @property
    def _mine(self) -> Spans:
        return (self.keys or self.queries)[self.ranks.rank]

    def _route(self, mixer) -> Route:
        keys = self.keys or self.queries
        return Route.plan(self.queries, -1, lambda source, rank: that_see(mixer, self.queries[source], keys[rank]))
