"""Two rings, for machines that are tied together by slower links than those inside of them (Double-Ring-Attention: LoongTrain, Gu et al.
2024, arXiv:2406.18485, section 4.3).

Keys and values go round inside a machine, as in `ring.py`; while they do, those with which that round began are on their way to the next
machine, from each rank to its like. So a hop between machines has a whole inner round to arrive in, and all ranks' links share it. In the
backward pass the gradients of an inner round come back to where it began, and go home from there while the next round runs.

With M machines of n ranks each, P = M n, a rank receives over the slower links, in place of the P - 1 parts that a single ring brings over
the one link between two machines:

    forward    K (D + Dv) b  N (M - 1) / P          backward    K (D + Dv) (b + w)  N (M - 1) / P

and inside its machine M (n - 1) parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from longtrain.parallel.circulate import Route, Tensors, added, buffers, circulate
from longtrain.parallel.layout import total
from longtrain.parallel.pieces import Spans, attend, attend_vjp, cut, empty, hull, places, seen_by_any, wide_zeros
from longtrain.parallel.ranks import Message, Pending, Ranks


@dataclass(frozen=True, slots=True)
class DoubleRing:
    """Attention over all ranks of several machines. `spans`: of every rank, machine by machine."""

    inner: Ranks
    """Those of this machine."""
    outer: Ranks
    """This rank's likes, one of each machine."""
    spans: tuple[Spans, ...]

    def attend(self, mixer, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mine, (out, lse) = self.spans[self._rank], empty(q, v)

        def visit(source: int, keys: Spans, kv: Tensors) -> None:
            first = source == self._rank
            attend(mixer, q, mine, *kv, keys, out, lse, with_sinks=first, fresh=first)

        self._go_round(mixer, (k, v), visit)
        return out.to(q.dtype), lse

    def attend_vjp(
        self, mixer, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        mine, dq = self.spans[self._rank], wide_zeros(q)

        def visit(source: int, keys: Spans, kv: Tensors) -> Tensors:
            dk, dv = map(wide_zeros, kv)
            attend_vjp(mixer, dout, q, None, lse, mine, *kv, keys, dq=dq, dk=dk, dv=dv, with_sinks=source == self._rank, delta=delta)
            return dk, dv

        dk, dv = self._go_round(mixer, (k, v), visit, added, in_halves=not getattr(mixer, "sinks", False))
        return dq, dk, dv

    @property
    def _rank(self) -> int:
        return self.outer.rank * self.inner.size + self.inner.rank

    def _go_round(
        self, mixer, kv: Tensors, visit: Callable[[int, Spans, Tensors], Tensors | None],
        combine: Callable[[Tensors, Tensors], Tensors] | None = None, in_halves: bool = True,
    ) -> Tensors | None:
        """`circulate` over all ranks: the cargoes of this machine, then those of the machines before it."""
        machines, n, here = self.outer.size, self.inner.size, self.outer.rank
        between = [self._between(mixer, j) for j in range(n)]
        route, held, at_home, homeward = between[self.inner.rank], kv, None, None
        for r in range(machines):
            origin = (here - r) % machines
            handed_on = self._hand_on(route, r, kv, held)
            cargoes = tuple(of_like.at(origin, r) or () for of_like in between)
            made = None
            if any(map(total, cargoes)):
                made = circulate(
                    self.inner,
                    Route.plan(cargoes, 1, lambda s, rank: seen_by_any(mixer, self.spans[here * n + rank], cargoes[s])),
                    tuple(x[:, :0] for x in kv) if held is None else held,
                    lambda s, keys, cargo: visit(origin * n + s, keys, cargo),
                    combine, what=("kv", "dkv"), in_halves=in_halves or r > 0,
                )  # fmt: skip
            if combine is not None and r == 0:
                at_home = made
            elif combine is not None:
                self._arrive(homeward, at_home, route, r - 1)
                homeward = self._send_home(route, r, made, at_home)
            held = handed_on.wait().get("kv between")
        if combine is not None and machines > 1:
            self._arrive(homeward, at_home, route, machines - 1)
        return at_home

    def _between(self, mixer, j: int) -> Route:
        """From machine to machine, for the ranks of number `j`: what any rank of a machine needs."""
        n, machines = self.inner.size, self.outer.size
        spans = tuple(self.spans[m * n + j] for m in range(machines))

        def needed(source: int, machine: int) -> Spans:
            of_ranks = [seen_by_any(mixer, self.spans[machine * n + i], spans[source]) for i in range(n)]
            return tuple(hull(span, parts) for span, parts in zip(spans[source], zip(*of_ranks, strict=True), strict=True))

        return Route.plan(spans, 1, needed)

    def _hand_on(self, route: Route, r: int, like: Tensors, held: Tensors | None) -> Pending:
        """Send the keys of round `r` to the next machine, and receive those of the next round."""
        machines, here, sends, receives = self.outer.size, self.outer.rank, [], []
        if r + 1 == machines:
            return self.outer.exchange((), ())
        origin, coming_from = (here - r) % machines, (here - r - 1) % machines
        if (further := route.at(origin, r + 1)) is not None:
            parts = tuple(cut(x, route.at(origin, r), further).contiguous() for x in held)
            sends.append(Message("kv between", (here + 1) % machines, parts))
        if (coming := route.at(coming_from, r + 1)) is not None:
            receives.append(Message("kv between", (here - 1) % machines, buffers(like, coming)))
        return self.outer.exchange(sends, receives)

    def _send_home(self, route: Route, r: int, made: Tensors | None, like: Tensors) -> Pending:
        """Send what this machine made of round `r`'s keys to where they are at home, and receive what another made of one's own."""
        machines, here, sends, receives = self.outer.size, self.outer.rank, [], []
        if route.at((here - r) % machines, r) is not None:
            sends.append(Message("dkv between", (here - r) % machines, tuple(x.contiguous() for x in made)))
        if (mine := route.at(here, r)) is not None:
            receives.append(Message("dkv between", (here + r) % machines, buffers(like, mine)))
        return self.outer.exchange(sends, receives)

    def _arrive(self, homeward: Pending | None, at_home: Tensors, route: Route, r: int) -> None:
        """Add what came home of round `r`."""
        returned = None if homeward is None else homeward.wait().get("dkv between")
        if returned is None:
            return
        mine, part, at = route.at(self.outer.rank, 0), route.at(self.outer.rank, r), 0
        for rows in places(mine, part):
            length = rows.stop - rows.start
            for whole, x in zip(at_home, returned, strict=True):
                whole[:, rows] += x[:, at : at + length]
            at += length
