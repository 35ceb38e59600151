"""A ring of ranks around which tensors travel, each as far as somebody needs it.

Every rank has a cargo (its keys and values, or its queries). At stop h it is at the rank h steps further on, cut to what that rank and
those behind it need; a journey that nobody needs any longer ends. While a rank works on one cargo the next is in flight. What is made of
a cargo on its way (gradients of keys, outputs of queries) follows one stop behind it, is combined at each stop in the same order every
time, and goes home from the last. Layout and mask decide the route, and every rank computes the same one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from math import prod, sqrt

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
    first: int | None = None,
) -> Tensors | None:
    """Call ``visit(source, spans, cargo)`` for one's own cargo and every one that comes by.

    With `combine`, what a visit returns (tensors ``[B, tokens of the spans, ...]``) is combined with what the stops before made of that
    cargo, and what came of one's own is returned: ``combine(made at home, made elsewhere)``. With `first`, so many tokens of one's own
    cargo are visited while the next one is on its way, and the others while what was made elsewhere is on its way home.
    """
    size, me, held, leaving, at_home = ranks.size, ranks.rank, cargo, None, None
    mine, last = route.stops[me][0], len(route.stops[me])
    now, later = _cut_in_two(mine, first) if combine and first is not None and last > 1 else (mine, ())
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


def tokens_of_work(share: float, cargo: Spans, others: Spans, *, seen_by: bool | None) -> int:
    """The first tokens of `cargo` that make up a share of what there is to do at home with `others`, which hold all of it.

    `seen_by`: cargo is seen by what stands behind it (keys), or else sees what stands before it (queries); None: every token all.
    """
    if seen_by is None:
        return round(share * total(cargo))
    starts, before = [span.start for span in others], [0, *accumulate(map(len, others))]
    holders = [bisect_right(starts, span.start) - 1 for span in cargo]
    others_before = [before[i] + span.start - starts[i] for span, i in zip(cargo, holders, strict=True)]
    # Token i of a span has to do with n0 + i others, or with n0 - i: a number n of them with n n0 +- n^2 / 2 in all.
    sign, n0s = (-1, [before[-1] - n for n in others_before]) if seen_by else (1, others_before)
    work = [len(span) * (n0 + sign * len(span) / 2) for span, n0 in zip(cargo, n0s, strict=True)]
    left, tokens = share * sum(work), 0
    for span, n0, of_span in zip(cargo, n0s, work, strict=True):
        if of_span >= left:
            return tokens + min(len(span), round(sign * (sqrt(max(0.0, n0**2 + sign * 2 * left)) - n0)))
        left, tokens = left - of_span, tokens + len(span)
    return tokens


def bytes_a_token(*tensors: Tensor, dtype: torch.dtype | None = None) -> int:
    return sum(prod(x.shape[2:]) * (x.dtype if dtype is None else dtype).itemsize for x in tensors)


def _cut_in_two(spans: Spans, left: int) -> tuple[Spans, Spans]:
    """The first `left` tokens and the others; as many spans each, of length zero where they are in the other one."""
    first, second = [], []
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
