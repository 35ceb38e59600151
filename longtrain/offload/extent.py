"""An extent: the bytes that were put for one span, the unit that moves between tiers. Its states, and how a tensor becomes bytes."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from longtrain.offload import fp8
from longtrain.offload.disk import DiskTier
from longtrain.offload.host import HostTier

Tier = HostTier | DiskTier


class State(enum.Enum):
    RESIDENT = "on the device, for as long as it lives"
    WRITING = "on its way to a tier; its source is kept, and forwarded to who asks"
    STORED = "in a tier alone"
    READING = "on its way back into a buffer of the device"
    READY = "in a tier and, for uses that were announced, on the device"
    FAILED = "lost, with the error that says why"
    RELEASED = "forgotten"


NEXT = {
    None: {State.RESIDENT, State.WRITING},
    State.WRITING: {State.WRITING, State.STORED, State.READY, State.RESIDENT, State.FAILED, State.RELEASED},
    State.STORED: {State.READING, State.RELEASED},
    State.READING: {State.READY, State.FAILED, State.RELEASED},
    State.READY: {State.STORED, State.RELEASED},
    State.RESIDENT: {State.RELEASED},
    State.FAILED: {State.RELEASED},
    State.RELEASED: set(),
}
"""Every transition there is. WRITING to WRITING or RESIDENT: a tier failed to take it."""


class Event(NamedTuple):
    """A transition, for timelines and tests. `seconds` are time.perf_counter's."""

    seconds: float
    extent: int
    label: str
    before: State | None
    after: State
    tier: str
    nbytes: int


@dataclass(slots=True, eq=False)
class Extent:
    number: int
    label: str
    """Name and span of its first put, for errors."""
    payload: Tensor | None
    """Its bytes on the device, or (RESIDENT) the tensor itself; None where they are in a tier alone."""
    version: int
    """Autograd's count of in-place edits of `payload` when it was what it must be."""
    nbytes: int
    tier: Tier | None = None
    offset: int = 0
    lead: int = 0
    """Bytes of its region before its first: where its payload begins in a page of memory, so that the disk takes the pages themselves."""
    state: State | None = None
    holders: int = 1
    """Names that it was put under."""
    pending: int = 0
    """Blocks of it that are under way."""
    checksums: dict[int, int | None] = field(default_factory=dict)
    """Of each block, by its start."""
    queued: int = 0
    """Announced uses whose fetch has not begun."""
    uses: int = 0
    """Announced uses for which `payload` is kept or being fetched."""
    error: Exception | None = None
    key: tuple | None = None
    """What equal bytes would be put as."""

    @property
    def room(self) -> int:
        """Bytes of its region."""
        return self.lead + self.nbytes


@dataclass(frozen=True, slots=True)
class Form:
    """How a tensor lies in the bytes of its extent: dense, in the order it had in memory, expanded axes once."""

    dtype: torch.dtype
    shape: torch.Size
    order: tuple[int, ...]
    stored: torch.Size
    compress: bool

    def restore(self, payload: Tensor) -> Tensor:
        dense = fp8.decode(payload, self.stored, self.dtype) if self.compress else payload.view(self.dtype).view(self.stored)
        return dense.permute([self.order.index(axis) for axis in range(len(self.order))]).expand(self.shape)


def pack(tensor: Tensor, compress: bool) -> tuple[Tensor, Form]:
    """The bytes ``[n]`` uint8 of a tensor, a view of it where it is dense in memory and not compressed; and how to undo it."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    once = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
    order = tuple(sorted(range(once.ndim), key=lambda axis: (-once.stride(axis), axis)))
    dense = once.permute(order).contiguous()
    form = Form(tensor.dtype, tensor.shape, order, dense.shape, compress)
    return fp8.encode(dense) if compress else dense.as_strided((dense.numel(),), (1,)).view(torch.uint8), form
