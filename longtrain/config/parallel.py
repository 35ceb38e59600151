"""What a configuration may say of several processes: how many share the batch, the weights, each sequence. Docstrings are the reference."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from longtrain.config.bounds import at_least
from longtrain.parallel.settings import Parallel
from longtrain.units import parse_time

DIMENSIONS = ("dp_replicate", "dp_shard", "cp_ring", "cp_ulysses")
"""From the outermost: ranks next to each other exchange heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How processes share the work: `torchrun --nproc-per-node=P -m longtrain train CONFIG`, with P the product of the four numbers.

    A single process, started without torchrun, does all of it by itself. Parameters, gradients and AdamW's moments are sharded (FSDP2)
    over dp_shard x cp_ring x cp_ulysses, and are the same in each of dp_replicate groups.
    """

    dp_replicate: int | None = 1
    """Groups that hold the whole model each and read other sequences. null, here or in one of the next three: as many as are left."""

    dp_shard: int | None = 1
    """Groups in each of those that read other sequences, and share the parameters."""

    cp_ring: int | None = 1
    """Groups that hold other tokens of the same sequence, and send queries, or keys and values, round."""

    cp_ulysses: int | None = 1
    """Processes in each of those that exchange heads; at most as many as there are query heads. Example: 8."""

    layout: Literal["auto", "contiguous", "zigzag", "striped"] = "auto"
    """Which tokens of each chunk a process holds; `auto`: striped, and contiguous where all exchange heads and some layers have windows."""

    way: Literal["auto", "heads", "ring", "queries", "halo"] = "auto"
    """What goes round between groups that hold other tokens; `auto`: for each layer, what is fewest bytes."""

    conv: Literal["auto", "halo", "channels"] = "auto"
    """How convolutions reach the tokens of others: each chunk fetches what its filter reaches, or channels are exchanged over all; `auto`:
    for each layer, what is fewest bytes."""

    states: Literal["auto", "heads", "scan"] = "auto"
    """How mixers with a state go along the sequence: by exchanges of heads, or by a state that is handed on; `auto`: for each layer, what
    is fewest bytes."""

    machine: int | None = None
    """Processes that are tied together by faster links than all: a ring turns inside of machines, and between them while it does. null:
    all links are alike. Example: 8."""

    step_timeout: str | None = None
    """Time in which a step or a validation must get one span ahead; the job ends otherwise, and says who waits where. When not given, 20
    times the time that the step's FLOPs take, two minutes at least. Example: 10m."""

    def __post_init__(self) -> None:
        for name in (*DIMENSIONS, "machine"):
            if getattr(self, name) is not None:
                at_least(f"parallel.{name}", getattr(self, name), 1)
        if sum(getattr(self, name) is None for name in DIMENSIONS) > 1:
            raise ValueError(f"parallel.{self._open[-1]}: only one of the four can be what is left, and two are null; give one a number")
        if self.step_timeout is not None:
            try:
                parse_time(self.step_timeout)
            except ValueError as error:
                raise ValueError(f"parallel.step_timeout: {error}") from None

    @property
    def _open(self) -> list[str]:
        return [name for name in DIMENSIONS if getattr(self, name) is None]

    def sizes(self, processes: int) -> tuple[int, int, int, int]:
        """The mesh of `processes`, by DIMENSIONS; (1, 1, 1, 1) for one. Raises ValueError where they do not fit."""
        if processes == 1:
            return (1, 1, 1, 1)
        given = {name: getattr(self, name) for name in DIMENSIONS}
        known = prod(size for size in given.values() if size is not None)
        if self._open and processes % known == 0:
            given[self._open[0]] = processes // known
        if self._open and processes % known or not self._open and processes != known:
            said = " x ".join(f"{name} {'what is left' if size is None else size}" for name, size in given.items())
            needed = f"a multiple of {known}" if self._open else known
            raise ValueError(
                f"parallel: {said} make {needed} processes, and {processes} were started; start {needed} (torchrun --nproc-per-node), or "
                "change these settings"
            )
        return tuple(given.values())

    def sharing(self) -> Parallel:
        """How a sequence is spread over those that share it."""
        return Parallel(layout=self.layout, way=self.way, conv=self.conv, states=self.states, machine=self.machine)
