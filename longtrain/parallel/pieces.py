"""Attention of runs of queries on runs of keys that stand anywhere in the sequence: what one rank computes by itself.

The op takes one contiguous run of positions on each side, so two lists of spans are a few calls of it, their outputs merged by LSE and their
gradients added, both in float32 or wider. Axes as in `longtrain.ops.attention`; a tensor holds the tokens of its spans one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longtrain.ops.attention import merge_attention
from longtrain.parallel.layout import total
from longtrain.span import Span

Spans = tuple[Span, ...]


def seen(mixer, queries: Span, keys: Span) -> Span:
    """The part of `keys` that any of `queries` may see; of length zero where none is."""
    start = mixer.keys_for(queries).start
    return keys & Span(start, max(start, queries.stop if mixer.causal else keys.stop))


def seen_by_any(mixer, queries: Sequence[Span], keys: Sequence[Span]) -> Spans:
    """For each of `keys` the smallest span that holds what any of `queries` may see of it."""
    return tuple(hull(key, [seen(mixer, query, key) for query in queries]) for key in keys)


def that_see(mixer, queries: Sequence[Span], keys: Sequence[Span]) -> Spans:
    """For each of `queries` itself, where it may see any of `keys`, else a span of length zero."""
    return tuple(query if any(len(seen(mixer, query, key)) for key in keys) else Span(query.start, query.start) for query in queries)


def hull(whole: Span, parts: Sequence[Span]) -> Span:
    """The smallest part of `whole` that holds all `parts`; at its start, of length zero, where they are empty."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return Span(whole.start, whole.start)
    return Span(min(part.start for part in parts), max(part.stop for part in parts))


def cut(x: Tensor, have: Sequence[Span], want: Sequence[Span]) -> Tensor:
    """The tokens of `want` out of those of `have`, each a part of its own."""
    if tuple(have) == tuple(want):
        return x
    return torch.cat([x[:, rows] for rows in places(have, want)], dim=1)


def places(have: Sequence[Span], want: Sequence[Span]) -> list[slice]:
    """Where each of `want` stands in a tensor that holds `have`, each a part of its own."""
    found, at = [], 0
    for whole, part in zip(have, want, strict=True):
        found.append(slice(at + part.start - whole.start, at + part.stop - whole.start))
        at += len(whole)
    return found


def attend(
    mixer, q: Tensor, queries: Sequence[Span], k: Tensor, v: Tensor, keys: Sequence[Span], out: Tensor, lse: Tensor,
    *, with_sinks: bool, fresh: bool,
) -> None:
    """Merge the attention of `queries` on `keys` into the wide `out` and `lse`, which are `empty` if `fresh`. A sink is one more key: of one
    block only."""
    for rows, query in _each(queries):
        for i, (cols, of_queries, of_keys) in enumerate(_calls(mixer, query, keys)):
            part = mixer.attend(of_queries, of_keys, q[:, rows], k[:, cols], v[:, cols], with_sinks=with_sinks and i == 0)
            out[:, rows], lse[:, rows] = part if fresh and i == 0 else merge_attention(out[:, rows], lse[:, rows], *part)


def attend_vjp(
    mixer, dout: Tensor, q: Tensor, out: Tensor | None, lse: Tensor, queries: Sequence[Span], k: Tensor, v: Tensor, keys: Sequence[Span],
    *, dq: Tensor, dk: Tensor, dv: Tensor, with_sinks: bool, delta: Tensor | None = None,
) -> None:
    """Add the gradients of `attend` into the wide `dq`, `dk`, `dv`, given the global out and lse; `delta` as in `AttentionMixer.attend_vjp`."""
    for rows, query in _each(queries):
        for i, (cols, of_queries, of_keys) in enumerate(_calls(mixer, query, keys)):
            dq[:, rows] += mixer.attend_vjp(
                of_queries, of_keys, dout[:, rows], q[:, rows], k[:, cols], v[:, cols], None if out is None else out[:, rows], lse[:, rows],
                dk=dk[:, cols], dv=dv[:, cols], with_sinks=with_sinks and i == 0, delta=None if delta is None else delta[:, rows],
            )


def _each(spans: Sequence[Span]) -> Iterator[tuple[slice, Span]]:
    at = 0
    for span in spans:
        if len(span):
            yield slice(at, at + len(span)), span
        at += len(span)


def _calls(mixer, query: Span, keys: Sequence[Span]) -> Iterator[tuple[slice, Span, Span]]:
    """The calls that show one run of queries what it sees: keys as a part of their tensor, positions of queries, of keys.

    Keys that the mixer shows to all that come later may stand anywhere before the queries: the leading ones are one call.
    """
    spans = list(keys)
    before = 0
    while mixer.shows_all_before and before < len(spans) and spans[before].stop <= query.start:
        before += 1
    at = total(spans[:before])
    if at:
        yield slice(0, at), Span(at, at + len(query)), Span(0, at)
    for span in spans[before:]:
        if len(part := seen(mixer, query, span)):
            yield slice(at + part.start - span.start, at + part.stop - span.start), query, part
        at += len(span)


def empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and LSE of queries that have seen no key yet, wide."""
    wide = torch.promote_types(q.dtype, torch.float32)
    shape = (*q.shape[:3], v.shape[3])
    return torch.zeros(shape, dtype=wide, device=q.device), torch.full(shape[:3], -torch.inf, dtype=wide, device=q.device)


def wide_zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
