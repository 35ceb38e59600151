"""Travelling queries: keys, values and their gradients stay; queries go round, and what becomes of them follows one stop behind.

    forward    visit: (out_s, lse_s) of this rank's keys, merged with those of the ranks before
    backward   visit: dk, dv += ..., and dq_s of this rank's keys, added to those of the ranks before

In the backward pass ``delta = sum(dout * out)`` travels in place of the output. A rank receives, with b bytes an element and w of an
accumulator, N tokens over P ranks that all need all:

    forward    H (D b + (Dv + 1) w)  N (P - 1) / P          backward    H ((D + Dv) b + (D + 2) w)  N (P - 1) / P

It goes the other way round than a ring of keys: a causal query meets those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longtrain.ops.attention import merge_attention
from longtrain.parallel.circulate import Route, added, bytes_a_token, circulate, tokens_of_work
from longtrain.parallel.pieces import Spans, attend, attend_vjp, empty, that_see, wide_zeros
from longtrain.parallel.ranks import Ranks


class Held(NamedTuple):
    """Some of the keys that a rank holds for queries that visit it, and of their values."""

    keys: Spans
    k: Tensor
    v: Tensor
    dk: Tensor | None = None
    """Wide sums of the gradients, in the backward pass."""
    dv: Tensor | None = None
    own: bool = True
    """Among them are those at the places of this rank's own queries: a sink counts once, with these."""


Blocks = Callable[[], Iterable[Held]]
"""One after the other, for each visit anew."""


@dataclass(frozen=True, slots=True)
class TravellingQueries:
    """Attention over `ranks`: queries stand at `queries`, keys at `keys`, by default at the same."""

    ranks: Ranks
    queries: tuple[Spans, ...]
    keys: tuple[Spans, ...] | None = None

    def attend(self, mixer, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q ``[B, n, H, D]``, k, v ``[B, S, K, D]`` of this rank's n queries and S keys: out and LSE."""
        return self.attend_blocks(mixer, q, v.shape[3], lambda: [Held(self._mine, k, v)])

    def attend_blocks(self, mixer, q: Tensor, value_dim: int, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """`attend`, of keys that are there block by block."""

        def visit(source: int, queries: Spans, cargo: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            made = None
            for held in blocks():
                if fresh := made is None:
                    made = empty(*cargo, held.v)
                sinks = source == self.ranks.rank and held.own
                attend(mixer, *cargo, queries, held.k, held.v, held.keys, *made, with_sinks=sinks, fresh=fresh)
            return made

        wide = torch.promote_types(q.dtype, torch.float32)
        home = q.shape[2] * (value_dim + 1) * wide.itemsize
        first = self._first_queries(mixer, bytes_a_token(q), home)
        merge = lambda a, b: merge_attention(*a, *b)
        out, lse = circulate(self.ranks, self._route(mixer), (q,), visit, merge, what=("q", "out"), first=first)
        return out.to(q.dtype), lse

    def attend_vjp(
        self, mixer, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dk, dv = map(wide_zeros, (k, v))
        return self.add_vjp(mixer, dout, q, lse, delta, lambda: [Held(self._mine, k, v, dk, dv)]), dk, dv

    def add_vjp(self, mixer, dout: Tensor, q: Tensor, lse: Tensor, delta: Tensor, blocks: Blocks) -> Tensor:
        """dq, wide; adds into the sums of the blocks."""

        def visit(source: int, queries: Spans, cargo: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            q_s, dout_s, lse_s, delta_s = cargo
            dq = wide_zeros(q_s)
            for held in blocks():
                attend_vjp(
                    mixer, dout_s, q_s, None, lse_s, queries, held.k, held.v, held.keys,
                    dq=dq, dk=held.dk, dv=held.dv, with_sinks=source == self.ranks.rank and held.own, delta=delta_s,
                )
            return (dq,)

        cargo = q, dout, lse, delta
        first = self._first_queries(mixer, bytes_a_token(*cargo), bytes_a_token(q, dtype=lse.dtype))
        (dq,) = circulate(self.ranks, self._route(mixer), cargo, visit, added, what=("q", "dq"), first=first)
        return dq

    def _first_queries(self, mixer, coming: int, home: int) -> int:
        """How many of this rank's queries to work on while others come, before what they made of its queries comes home: by the bytes of
        both."""
        queries = self.queries[self.ranks.rank]
        return tokens_of_work(coming / (coming + home), queries, self._mine, seen_by=False if mixer.causal else None)

    @property
    def _mine(self) -> Spans:
        return (self.keys or self.queries)[self.ranks.rank]

    def _route(self, mixer) -> Route:
        keys = self.keys or self.queries
        return Route.plan(self.queries, -1, lambda source, rank: that_see(mixer, self.queries[source], keys[rank]))
