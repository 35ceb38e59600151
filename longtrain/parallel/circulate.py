"""A ring of ranks around which tensors travel, each as far as somebody needs it.

Every rank has a cargo (its keys and values, or its queries). At stop h it is at the rank h steps further on, cut to what that rank and
those behind it need; a journey that nobody needs any longer ends. While a rank works on one cargo the next is in flight. What is made of
a cargo on its way (gradients of keys, outputs of queries) follows one stop behind it, is combined at each stop in the same order every
time, and goes home from the last. Layout and mask decide the route, and every rank computes the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longtrain.parallel.layout import total
from longtrain.parallel.pieces import Spans, cut, hull, places
from longtrain.parallel.ranks import Message, Ranks
from longtrain.span import Span

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """``stops[s][h]``: what of rank s's cargo reaches its stop h, at rank ``s + h * step``; stop 0 is home, the last the last needed."""

    step: int
    stops: tuple[tuple[Spans, ...], ...]

    @classmethod
    def plan(cls, spans: tuple[Spans, ...], step: int, needed: Callable[[int, int], Spans]) -> Route:
        """`spans` of each rank's cargo; ``needed(s, r)`` says what of each span of rank s's cargo rank r needs."""
        ranks, stops = len(spans), []
        for source, cargo in enumerate(spans):
            wanted = [needed(source, (source + h * step) % ranks) for h in range(1, ranks)]
            journey = [cargo]
            for h in range(len(wanted)):
                rest = tuple(hull(span, parts) for span, parts in zip(cargo, zip(*wanted[h:], strict=True), strict=True))
                if not total(rest):
                    break
                journey.append(rest)
            stops.append(tuple(journey))
        return cls(step, tuple(stops))

    def at(self, source: int, stop: int) -> Spans | None:
        """What of the cargo of `source` reaches a stop, or None."""
        return self.stops[source][stop] if 0 <= stop < len(self.stops[source]) else None


def circulate(
    ranks: Ranks,
    route: Route,
    cargo: Tensors,
    visit: Callable[[int, Spans, Tensors], Tensors | None],
    combine: Callable[[Tensors, Tensors], Tensors] | None = None,
    what: tuple[str, str] = ("cargo", "made"),
    in_halves: bool = True,
) -> Tensors | None:
    """Call ``visit(source, spans, cargo)`` for one's own cargo and every one that comes by.

    With `combine`, what a visit returns (tensors ``[B, tokens of the spans, ...]``) is combined with what the stops before made of that
    cargo, and what came of one's own is returned: ``combine(made at home, made elsewhere)``. One's own cargo is then visited in two halves,
    unless not `in_halves`: the second while what was made elsewhere is on its way home.
    """
    size, me, held, leaving, at_home = ranks.size, ranks.rank, cargo, None, None
    mine, last = route.stops[me][0], len(route.stops[me])
    now, later = _halves(mine) if combine and in_halves and last > 1 else (mine, ())
    half = total(now)
    neighbour = lambda steps: (me + steps * route.step) % size
    for h in range(size + 1):
        source, spans = neighbour(-h), route.at(neighbour(-h), h) if h < size else None
        sends, receives = [], []
        if spans is not None and (further := route.at(source, h + 1)) is not None:
            sends.append(Message(what[0], neighbour(1), tuple(cut(x, spans, further).contiguous() for x in held)))
        if (coming := route.at(neighbour(-h - 1), h + 1) if h + 1 < size else None) is not None:
            receives.append(Message(what[0], neighbour(-1), buffers(cargo, coming)))
        if leaving is not None:  # made of the cargo that was here one stop ago
            owner = neighbour(1 - h)
            sends.append(Message(what[1], neighbour(1) if route.at(owner, h) is not None else owner, leaving))
        if combine and spans is not None and h > 1:
            receives.append(Message(what[1], neighbour(-1), buffers(at_home, route.stops[source][1])))
        if combine and h == last > 1:
            receives.append(Message(what[1] + " home", neighbour(h - 1), buffers(at_home, route.stops[me][1])))
        pending = ranks.exchange(sends, receives)
        if h == 0:
            at_home = visit(me, now, tuple(x[:, :half] for x in cargo))
        elif spans is not None:
            made = visit(source, spans, held)
        if h == last and total(later):
            rest = visit(me, later, tuple(x[:, half:] for x in cargo))
            at_home = tuple(torch.cat(parts, dim=1) for parts in zip(at_home, rest, strict=True))
        arrived = pending.wait()
        held, leaving = arrived.get(what[0]), None
        if combine and h > 0 and spans is not None:
            leaving = _combined(combine, arrived.get(what[1]), made, route.stops[source][1], spans)
        if (returned := arrived.get(what[1] + " home")) is not None:
            at_home = _combined(combine, at_home, returned, mine, route.stops[me][1])
    return at_home


def _halves(spans: Spans) -> tuple[Spans, Spans]:
    """Cut in the middle; each half has as many spans, of length zero where they are in the other one."""
    left, first, second = (total(spans) + 1) // 2, [], []
    for span in spans:
        middle = span.start + min(left, len(span))
        left -= middle - span.start
        first.append(Span(span.start, middle))
        second.append(Span(middle, span.stop))
    return tuple(first), tuple(second)


def _combined(combine, total_so_far: Tensors | None, made: Tensors, have: Spans, part: Spans) -> Tensors:
    """What was made of `part` combined into what there is of `have`."""
    if total_so_far is None:
        return tuple(x.contiguous() for x in made)
    offset = 0
    for rows in places(have, part):
        piece = slice(offset, offset + rows.stop - rows.start)
        offset = piece.stop
        new = combine(tuple(x[:, rows] for x in total_so_far), tuple(x[:, piece] for x in made))
        for x, y in zip(total_so_far, new, strict=True):
            x[:, rows] = y
    return total_so_far


def buffers(like: Tensors, spans: Spans) -> Tensors:
    return tuple(x.new_empty(x.shape[0], total(spans), *x.shape[2:]) for x in like)


def added(a: Tensors, b: Tensors) -> Tensors:
    return tuple(x + y for x, y in zip(a, b, strict=True))
