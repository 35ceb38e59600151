"""The token store: tensors along the token axis, kept by span in a tier. Its interface, and the device tier.

Only spans and bytes are known here, no layers. A name stands for one tensor of a sequence (a layer's input, its attention output);
an extent is what was put for one span of it, the unit that moves between tiers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longtrain.offload.place import DEVICE, Place
from longtrain.span import Span

TOKEN_AXIS = 1
"""Every stored tensor is token-major: ``[B, tokens, ...]``."""


class TokenStore(Protocol):
    """Where tensors of the sequence live between their uses."""

    def put(self, name: Hashable, span: Span, tensor: Tensor, place: Place = DEVICE) -> None:
        """Keep `tensor` ``[B, len(span), ...]`` as the extent of `name` at `span`. Spans of one name do not overlap."""

    def get(self, name: Hashable, span: Span) -> Tensor:
        """The tokens of `span` on the device, from one extent or joined from several. Raises KeyError when a token was never put."""

    def prefetch(self, order: Iterable[tuple[Hashable, Span]], *, first: bool = False) -> None:
        """What will be asked for, in order, after all that was announced before (`first`: before it); slower tiers fetch as staging allows.

        Extents that are unknown or on the device are skipped, and a get out of order is answered all the same.
        """

    def release(self, name: Hashable, span: Span | None = None) -> None:
        """Forget the extents of `name` that lie within `span`, or all of them. Unknown names are no error."""

    def close(self) -> None:
        """Forget everything and give back files, threads and arenas. The store is not used again."""


@dataclass(slots=True)
class _Extent:
    tensor: Tensor
    version: int


class DeviceStore:
    """The device tier: extents are the tensors themselves, without a copy.

    An in-place edit between put and get would be a silently wrong gradient, so the version counter is compared, as autograd does
    for what it saves.
    """

    def __init__(self) -> None:
        self._extents: dict[Hashable, dict[Span, _Extent]] = {}

    def put(self, name: Hashable, span: Span, tensor: Tensor, place: Place = DEVICE) -> None:
        if place != DEVICE:
            setting = {"host": "memory.host_budget", "disk": "memory.disk"}.get(place.tier, "memory.host_budget or memory.disk")
            raise ValueError(f"{name}: {place} needs slower tiers, and this run has the device's memory alone; set {setting}")
        extents = self._extents.setdefault(name, {})
        check_put(name, span, tensor, extents)
        extents[span] = _Extent(tensor, version_of(tensor))

    def get(self, name: Hashable, span: Span) -> Tensor:
        extents = self._extents.get(name, {})
        return join([(self._read(name, s, extents[s]), part) for s, part in covering(name, extents, span)])

    def prefetch(self, order: Iterable[tuple[Hashable, Span]], *, first: bool = False) -> None:
        """Everything is here already."""

    def release(self, name: Hashable, span: Span | None = None) -> None:
        extents = self._extents.get(name, {})
        for gone in inside(extents, span):
            del extents[gone]
        if not extents:
            self._extents.pop(name, None)

    def close(self) -> None:
        self._extents.clear()

    def names(self) -> list[Hashable]:
        """The names that hold extents now; empty when every step cleaned up after itself."""
        return list(self._extents)

    def held(self) -> list[tuple[Hashable, Span, Tensor]]:
        """What is on the device now, by name and span: for the memory profiler."""
        return [(name, span, extent.tensor) for name, extents in self._extents.items() for span, extent in extents.items()]

    @staticmethod
    def _read(name: Hashable, span: Span, extent: _Extent) -> Tensor:
        if version_of(extent.tensor) != extent.version:
            raise RuntimeError(edited(f"{name} at {span}"))
        return extent.tensor


def check_put(name: Hashable, span: Span, tensor: Tensor, extents: Iterable[Span]) -> None:
    """Raises ValueError where `tensor` is not `span` long, or `span` overlaps what is there."""
    if tensor.shape[TOKEN_AXIS] != len(span):
        raise ValueError(f"{name}: tensor {list(tensor.shape)} does not hold the {len(span)} tokens of {span}")
    if clash := next((s for s in extents if s.start < span.stop and span.start < s.stop), None):
        raise ValueError(f"{name}: {span} overlaps the extent {clash}")


def inside(extents: Collection[Span], span: Span | None) -> list[Span]:
    """Those of the extents, which do not overlap, that lie in `span` as a whole; None: all."""
    if span in extents:
        return [span]
    return [s for s in extents if span is None or len(s & span) == len(s)]


def covering(name: Hashable, extents: Collection[Span], span: Span) -> list[tuple[Span, slice | None]]:
    """The extents that hold the tokens of `span`, in order, each with the part of it (None: all of it). Raises KeyError."""
    if span in extents:
        return [(span, None)]
    found, at = [], span.start
    for extent in sorted(s for s in extents if len(s & span)):
        common = extent & span
        if common.start != at:
            break
        found.append((extent, None if common == extent else common.slice(extent.start)))
        at = common.stop
    if at != span.stop or not found:
        raise KeyError(f"{name}: token {at} of {span} is not stored")
    return found


def join(pieces: list[tuple[Tensor, slice | None]]) -> Tensor:
    """The parts one after the other along the tokens."""
    parts = [tensor if part is None else tensor[:, part] for tensor, part in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=TOKEN_AXIS)


def edited(what: str) -> str:
    return (
        f"{what} was modified in place after it was saved for the backward pass; "
        "clone the tensor before editing it, or edit it after backward"
    )


def version_of(tensor: Tensor) -> int:
    """Autograd's count of in-place edits; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True, slots=True, eq=False)
class _Name:
    """A store name that equals only itself, so that two calls of one layer never meet."""

    label: str

    def __str__(self) -> str:
        return self.label


class Stored:
    """One tensor of the sequence in a store, owned: its extents are released when the owner goes."""

    def __init__(self, store: TokenStore, label: str, place: Callable[[Span], Place] | None = None) -> None:
        """`place` says where each span goes; the device where it is not given."""
        self.store, self.name, self.place = store, _Name(label), place
        self.dtype: torch.dtype | None = None
        """Of what was put last."""
        self.early: set[Span] = set()
        """Spans that were announced before their reader began."""

    def put(self, span: Span, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.store.put(self.name, span, tensor, self.place(span) if self.place else DEVICE)

    def get(self, span: Span) -> Tensor:
        return self.store.get(self.name, span)

    def take(self, span: Span) -> Tensor:
        """Get and release."""
        tensor = self.store.get(self.name, span)
        self.store.release(self.name, span)
        return tensor

    def __del__(self) -> None:
        self.store.release(self.name)
