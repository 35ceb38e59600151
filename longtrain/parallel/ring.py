"""Ring attention (Liu et al. 2023, arXiv:2310.01889): queries stay, keys and values go round; in the backward pass so do dK and dV.

    forward    visit: (out, lse) <- merge((out, lse), attention(q, k_s, v_s))
    backward   visit: dq += ..., and dk_s, dv_s of this rank's queries, added to what the ranks before made of them

Grouped heads travel unexpanded. A rank receives, with b bytes an element and w of an accumulator, N tokens over P ranks that all need all:

    forward    K (D + Dv) b  N (P - 1) / P          backward    K (D + Dv) (b + w)  N (P - 1) / P

and less where causality, windows or documents end the journeys sooner.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longtrain.parallel.circulate import Route, added, circulate
from longtrain.parallel.pieces import Spans, attend, attend_vjp, empty, seen_by_any, wide_zeros
from longtrain.parallel.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Ring:
    """Attention over `ranks` that hold `spans`."""

    ranks: Ranks
    spans: tuple[Spans, ...]

    def attend(self, mixer, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mine, (out, lse) = self.spans[self.ranks.rank], empty(q, v)

        def visit(source: int, keys: Spans, kv: tuple[Tensor, ...]) -> None:
            first = source == self.ranks.rank
            attend(mixer, q, mine, *kv, keys, out, lse, with_sinks=first, fresh=first)

        circulate(self.ranks, self._route(mixer), (k, v), visit, what=("kv", ""))
        return out.to(q.dtype), lse

    def attend_vjp(
        self, mixer, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        mine, dq = self.spans[self.ranks.rank], wide_zeros(q)

        def visit(source: int, keys: Spans, kv: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            dk, dv = map(wide_zeros, kv)
            attend_vjp(mixer, dout, q, None, lse, mine, *kv, keys, dq=dq, dk=dk, dv=dv, with_sinks=source == self.ranks.rank, delta=delta)
            return dk, dv

        one_visit = getattr(mixer, "sinks", False)  # a sink's gradient is made once, with the keys at home
        dk, dv = circulate(self.ranks, self._route(mixer), (k, v), visit, added, what=("kv", "dkv"), in_halves=not one_visit)
        return dq, dk, dv

    def _route(self, mixer) -> Route:
        return Route.plan(self.spans, 1, lambda source, rank: seen_by_any(mixer, self.spans[rank], self.spans[source]))
