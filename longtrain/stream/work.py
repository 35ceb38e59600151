"""What runs on a token, counted operation by operation on a tiny example, or on shapes alone (tensors of the meta device).

    products   FLOP of matrix products, by the smaller side of their matrix (small ones run at a lower rate) and the bytes of an element
    others     bytes that all other operations read and write, by their names: some do more with a byte than others
    made       blocks of new memory: where the system clears their pages, they cost more than what is written into them
    calls      operations: each costs its launch, however few tokens it is given
    levels     bytes alive after each operation, of what was made since counting began
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1, "aten::baddbmm_": 1}
"""Which argument is the first factor; the second one follows it."""

Line = tuple[float, float]
"""Bytes a token, and bytes beside: what is alive at one moment of a chunk of any length."""


@dataclass(frozen=True, slots=True)
class Work:
    """Of one token; `made` and `calls` of a chunk, the latter whatever its length."""

    products: tuple[tuple[tuple[int, int], float], ...] = ()
    others: tuple[tuple[str, Line], ...] = ()
    """(operation, bytes by the chunk's tokens): weights that are cast are so many in a chunk of any length."""
    made: tuple[tuple[Line, int], ...] = ()
    """(bytes of a block by the chunk's tokens, how many of this size)."""
    calls: int = 0

    @property
    def flops(self) -> float:
        return sum(flops for _, flops in self.products)

    @property
    def moved(self) -> float:
        """Bytes of all operations that are no products, a token."""
        return sum(slope for _, (slope, _) in self.others)


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live: `now`, and `most` at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count(made(out, args, kwargs))
        return out

    def count(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._storages:
                self._storages.add(key)
                self.now += size
                weakref.finalize(storage, self._free, key, size)
        self.most = max(self.most, self.now)

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.now -= size


def made(out, args, kwargs) -> list[Tensor]:
    """Tensors of what an operation gave out that are no views of what it was given."""
    given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    return [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given]


class Counting(Alive):
    def __init__(self, tokens: int) -> None:
        """`tokens`: of the example, by which the side of a product that runs along them is known."""
        super().__init__()
        self._tokens = tokens
        self.products: Counter[tuple[int, int]] = Counter()
        self.others: Counter[str] = Counter()
        self.made: list[int] = []
        self.calls = 0
        self.levels: list[int] = []
        self.noted: list[int] = []
        """Levels at moments that somebody else wants to know of."""
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs here is not counted, and what it makes is not alive."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self._paused:
            return out
        fresh = made(out, args, kwargs)
        self.count(fresh)
        self.made += [tensor.untyped_storage().nbytes() for tensor in fresh]
        self.levels.append(self.now)
        if (first := PRODUCTS.get(func._schema.name)) is not None:
            a, b = args[first : first + 2]
            sides = [a.shape[-2], a.shape[-1], b.shape[-1]]
            flops = 2 * a.shape[:-2].numel() * prod(sides)
            sides.remove(self._tokens if self._tokens in sides else min(sides))
            self.products[min(sides), a.element_size()] += flops
        elif fresh or func._schema.is_mutable:
            self.others[func._schema.name] += sum(_bytes(t) for t in (*tree_leaves((args, kwargs)), *fresh) if isinstance(t, Tensor))
        else:  # a view
            return out
        self.calls += 1
        return out

    def so_far(self) -> Snapshot:
        return self.products.copy(), self.others.copy(), tuple(self.made), self.calls


def _bytes(tensor: Tensor) -> int:
    """What an operation touches of a tensor: of an expanded one, what is there."""
    return tensor.element_size() * torch.Size(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step).numel()


Snapshot = tuple[Counter[tuple[int, int]], Counter[str], tuple[int, ...], int]


def work_between(first: Sequence[Snapshot], last: Sequence[Snapshot], tokens: Sequence[int]) -> Work:
    """A token's share of what was done between two moments, seen with `tokens` of two lengths."""
    small, large = ((b[0] - a[0], b[1] - a[1], b[2][len(a[2]) :], b[3] - a[3]) for a, b in zip(first, last, strict=True))
    more = tokens[1] - tokens[0]
    products = tuple(sorted((key, (large[0][key] - small[0][key]) / more) for key in large[0]))
    slopes = {name: (large[1][name] - small[1][name]) / more for name in large[1]}
    others = tuple(sorted((name, (slope, max(0.0, large[1][name] - slope * tokens[1]))) for name, slope in slopes.items()))
    alike = len(small[2]) == len(large[2])  # where operations differ (experts that no token went to) every block is taken to grow
    slopes = [(b - a) / more for a, b in zip(small[2], large[2], strict=True)] if alike else [b / tokens[1] for b in large[2]]
    made = Counter((slope, size - slope * tokens[1]) for slope, size in zip(slopes, large[2], strict=True))
    return Work(products, others, tuple(sorted(made.items())), large[3])


def lines(levels: Sequence[Sequence[int]], tokens: Sequence[int]) -> tuple[Line, ...]:
    """The highest of `levels`, seen with `tokens` of two lengths, for chunks of any length: the largest of these lines."""
    small, large = levels
    if len(small) != len(large):  # operations differ (experts that no token went to): the highest alone
        small, large = [max(small)], [max(large)]
    slopes = [(b - a) / (tokens[1] - tokens[0]) for a, b in zip(small, large, strict=True)]
    found = sorted({(slope, a - slope * tokens[0]) for slope, a in zip(slopes, small, strict=True)}, reverse=True)
    kept: list[Line] = []
    for slope, constant in found:  # a line that is neither steeper nor higher than another never decides
        if not kept or constant > kept[-1][1]:
            kept.append((slope, constant))
    return tuple(kept)


def highest(of: Sequence[Line], tokens: int) -> float:
    return max((slope * tokens + constant for slope, constant in of), default=0.0)
