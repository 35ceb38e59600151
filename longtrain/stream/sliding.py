"""A run of tokens in one buffer that moves along the sequence: it grows at one end and forgets at the other.

A window's keys, and the gradient sums of a window's keys, need this much of the sequence at one time and no more; one buffer, so that a
chunk's attention is one call of the kernel.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longtrain.span import Span

SLACK = 4
"""A buffer is 1 / SLACK longer than what it must hold, so that its tokens are moved once in several chunks."""


def first_needed(spans: Sequence[Span], keys_for: Callable[[Span], Span]) -> dict[int, int]:
    """By the end of each chunk: the start of the first chunk that it sees."""
    starts = [span.start for span in spans]
    return {span.stop: starts[bisect_right(starts, keys_for(span).start) - 1] for span in spans}


def capacity(reach: int, tokens: int) -> int:
    """Tokens of the buffer that holds `reach` of a sequence's `tokens` at a time."""
    return min(tokens, reach + reach // SLACK)


class Sliding:
    """Tokens `held` of a tensor ``[B, tokens, ...]``; `reach` is the most that is needed at one time."""

    def __init__(self, reach: int, tokens: int) -> None:
        self._capacity, self._tokens = capacity(reach, tokens), tokens
        self._buffer: Tensor | None = None
        self._origin = 0
        """The position of the buffer's first token."""
        self.held: Span | None = None

    def append(self, span: Span, part: Tensor, needed_from: int) -> None:
        """Take the tokens that follow those held; what lies before `needed_from` may be forgotten."""
        if self.held is None:
            self._begin(span, part, origin=span.start)
            return
        if span.stop - self._origin > self._capacity:
            self._keep(self.held & Span(needed_from, span.stop), origin=needed_from)
        self.held = Span(self.held.start, span.stop)
        self[span].copy_(part)

    def prepend(self, span: Span, part: Tensor, needed_to: int) -> None:
        """Take the tokens that come before those held; what lies from `needed_to` on may be forgotten."""
        if self.held is None:
            self._begin(span, part, origin=span.stop - self._capacity)
            return
        if span.start < self._origin:
            self._keep(self.held & Span(0, needed_to), origin=needed_to - self._capacity)
        self.held = Span(span.start, self.held.stop)
        self[span].copy_(part)

    def extend(self, span: Span, like: Tensor, dtype: torch.dtype) -> None:
        """Zeros, in the shape of tokens of `like`, for those of `span` that come before what is held."""
        stop = span.stop if self.held is None else self.held.start
        new = Span(min(span.start, stop), stop)
        if len(new):
            self.prepend(new, like.new_zeros(like.shape[0], len(new), *like.shape[2:], dtype=dtype), span.stop)

    def __getitem__(self, span: Span) -> Tensor:
        """A view of tokens that are held."""
        return self._buffer[:, span.slice(self._origin)]

    def _begin(self, span: Span, part: Tensor, origin: int) -> None:
        self.held = span
        if len(span) == self._tokens:  # the whole sequence at once needs no copy: nothing will be written behind it
            self._buffer, self._origin = part, span.start
            return
        self._buffer, self._origin = part.new_empty(part.shape[0], self._capacity, *part.shape[2:]), origin
        self[span].copy_(part)

    def _keep(self, kept: Span, origin: int) -> None:
        part = self[kept].clone()
        self.held, self._origin = kept, origin
        self[kept].copy_(part)
