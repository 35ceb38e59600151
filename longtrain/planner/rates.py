"""What a machine does in a second: data, and how a rate is read at a size between those that were measured."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from math import inf, log

import torch

Table = tuple[tuple[int, float], ...]
"""(size, rate), by size."""

Named = tuple[tuple[str, float], ...]
"""(operation, rate)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Speeds that plans are weighed by. Raises ValueError naming the one that is not above 0.

    Only `flops` and the tiers have to be known: where no table is given, everything that computes runs at `flops`, and what moves
    memory, launches or sends costs nothing. `longtrain calibrate` measures all of it, `longtrain.planner.machines` has usual figures.
    """

    flops: float
    """FLOP/s of a step: attention and matrix products in the model's dtype, with everything between them."""

    host_write: float
    """Bytes/s from the device to host memory, checksums included."""

    host_read: float
    """Bytes/s back."""

    disk_write: float
    """Bytes/s from the device to the disk (`tools/bench_offload.py` measures them)."""

    disk_read: float
    """Bytes/s back."""

    products: Table = ()
    """FLOP/s of matrix products of many rows, by the smaller side of the matrix."""

    wide_products: Table = ()
    """The same in float32, where `products` are of 16 bits and those of the loss are not; empty: as `products`."""

    attention: Table = ()
    """FLOP/s of attention's forward pass, causal, by head dim; FLOP of visible pairs alone are counted."""

    attention_backward: Table = ()
    """The same of its backward pass."""

    attention_call: Table = ()
    """Seconds that a call of the forward kernel takes however little it is given, by head dim: its scratch memory, and Python."""

    attention_backward_call: Table = ()
    """The same of the backward kernel."""

    mixers: Named = ()
    """FLOP/s of other mixers by the names that they give their work, and with " backward" behind it; what is missing runs at `flops`."""

    moved: float = inf
    """Bytes/s that operations read and write which are no products, in memory that is there: sums, and what `operations` does not name."""

    operations: Named = ()
    """The same of those that were measured by themselves, as torch calls them: an exponential is no sum."""

    made: Table = ()
    """Bytes/s of new memory, by the size of a block: where the system gives and clears its pages. Empty: it costs nothing."""

    optimizer: float = inf
    """Bytes/s that the optimizer's update reads and writes, on the device."""

    host_optimizer: float = inf
    """The same on the host."""

    launch: float = 0.0
    """Seconds that an operation takes however small it is."""

    slower: Table = ()
    """How many times as long `moved`, `operations`, `made` and `launch` take in a step, where nothing is found in the caches, by the bytes
    of a chunk's hidden states. Empty: once."""

    handing_over: float = 0.0
    """Seconds of the processor that feeds the device, for each extent that it hands to a slower tier or takes back, whatever its size."""

    link: float = inf
    """Bytes/s that a device receives from the others, in collectives."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            for one in [rate for _, rate in value] if isinstance(value, tuple) else [value]:
                if not one > 0 and not (field.name in ("launch", "handing_over") and one == 0):
                    raise ValueError(f"rates.{field.name} must be above 0, found {one!r}")

    def in_step(self, hidden_bytes: float) -> Rates:
        """As things go in a step whose chunks have hidden states of so many bytes."""
        if not self.slower:
            return self
        slower = between(self.slower, hidden_bytes)
        tables = {of: tuple((key, rate / slower) for key, rate in getattr(self, of)) for of in ("made", "operations")}
        return replace(self, slower=(), moved=self.moved / slower, launch=self.launch * slower, **tables)

    def write(self, tier: str) -> float:
        return {"host": self.host_write, "disk": self.disk_write}[tier]

    def read(self, tier: str) -> float:
        return {"host": self.host_read, "disk": self.disk_read}[tier]

    def new_memory(self, made: Iterable[tuple[tuple[float, float], int]], tokens: float) -> float:
        """Seconds of the blocks of a chunk of so many tokens."""
        sizes = [(slope * tokens + constant, count) for (slope, constant), count in made] if self.made else []
        return sum(count * size / between(self.made, size) for size, count in sizes if size > 0)

    def product(self, size: int, itemsize: int) -> float:
        """FLOP/s of a product of elements of so many bytes."""
        return self.at(self.wide_products if itemsize >= 4 and self.wide_products else self.products, size)

    def mixer(self, name: str, backward: bool) -> float:
        """FLOP/s of a mixer that is no attention."""
        return dict(self.mixers).get(name + " backward" * backward, self.flops)

    def of(self, operation: str) -> float:
        """Bytes/s of an operation that is no product."""
        return dict(self.operations).get(operation, self.moved)

    def at(self, table: Table, size: float) -> float:
        """FLOP/s at a size: between two measured ones on the straight line over the logarithm, beyond them the nearest."""
        return between(table, size) if table else self.flops

    def call(self, table: Table, size: float) -> float:
        """Seconds of a call at a head dim."""
        return between(table, size) if table else 0.0


def between(table: Table, size: float) -> float:
    place = bisect_left([s for s, _ in table], size)
    if place in (0, len(table)):
        return table[min(place, len(table) - 1)][1]
    (s0, r0), (s1, r1) = table[place - 1 : place + 1]
    return r0 + (r1 - r0) * log(size / s0) / log(s1 / s0)


def usual_rates(device: torch.device) -> Rates:
    """Where nothing was measured. CPU: 45 GFLOP/s a thread, a disk at 1.3 GB/s write and 0.9 read, as on the machine that the README's
    figures are from, 8 GB/s a thread through operations of 6 us each; GPU: 400 TFLOP/s, PCIe 4 and a fast NVMe disk, 1.6 TB/s, 5 us."""
    if device.type == "cuda":
        return Rates(flops=400e12, host_write=22e9, host_read=22e9, disk_write=3e9, disk_read=5e9, moved=1.6e12, launch=5e-6)
    threads = torch.get_num_threads()
    tiers = dict(host_write=4e9, host_read=4e9, disk_write=1.3e9, disk_read=0.9e9)
    return Rates(flops=45e9 * threads, moved=8e9 * threads, optimizer=8e9 * threads, launch=6e-6, **tiers)
