"""Which parts of a tier's bytes are free."""

from __future__ import annotations

from bisect import bisect_left

ALIGNMENT = 4096
"""Of memory, lengths and offsets: what every disk takes for O_DIRECT."""


def padded(nbytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-nbytes // alignment) * alignment


class Regions:
    """`nbytes` of room in pieces that are multiples of `alignment`: best fit, neighbours joined when they are given back."""

    def __init__(self, nbytes: int, alignment: int) -> None:
        self.alignment, self.nbytes = alignment, nbytes - nbytes % alignment
        self.used = self.most = 0
        """Bytes that are taken now, and the most that ever were."""
        self._free: list[tuple[int, int]] = [(0, self.nbytes)] if self.nbytes else []  # (offset, bytes), by offset

    def padded(self, nbytes: int) -> int:
        return padded(nbytes, self.alignment)

    def take(self, nbytes: int) -> int | None:
        """The offset of `nbytes` of room, or None where no free piece is that large."""
        need = self.padded(nbytes)
        best = min(((size, at) for at, size in self._free if size >= need), default=None)
        if best is None:
            return None
        self.used += need
        self.most = max(self.most, self.used)
        size, at = best
        index = bisect_left(self._free, (at, size))
        self._free[index : index + 1] = [(at + need, size - need)] if size > need else []
        return at

    def give(self, offset: int, nbytes: int) -> None:
        """Back what `take` gave for `nbytes` at `offset`."""
        start, stop = offset, offset + self.padded(nbytes)
        index = bisect_left(self._free, (start, 0))
        last = index
        if index and sum(self._free[index - 1]) >= start:
            index -= 1
            if sum(self._free[index]) > start:
                raise RuntimeError(f"the region at {offset} is free already")
            start = self._free[index][0]
        if last < len(self._free) and self._free[last][0] <= stop:
            if self._free[last][0] < stop:
                raise RuntimeError(f"the region at {offset} is free already")
            stop = sum(self._free[last])
            last += 1
        self._free[index:last] = [(start, stop - start)]
        self.used -= self.padded(nbytes)
