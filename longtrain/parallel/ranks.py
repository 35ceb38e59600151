"""The processes that share a sequence, and every byte that passes between them.

The only place that calls torch.distributed. What is sent is counted where it is sent, by what it is, so that tests hold the formulas of
`cost.py` against the calls.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from longtrain.parallel.timeline import Asked, Log, Posted


@dataclass(frozen=True, slots=True)
class Lane:
    """One exchange on the timeline of a rank, in seconds of `time.perf_counter`."""

    what: str
    nbytes: int
    started: float
    asked: float
    """When the rank needed it, and began to wait."""
    done: float
    of_link: float
    """Seconds that it was later by a slower link."""


@dataclass(slots=True)
class Traffic:
    """What this rank received from others, in bytes by what it was ("kv", "dkv", "q", ...), and when, if `lanes` is set to a list."""

    received: Counter[str] = field(default_factory=Counter)
    lanes: list[Lane] | None = None
    log: Log | None = None
    """Set to a list: what `longtrain.parallel.timeline` plays again."""
    clock: Callable[[], float] = time.thread_time
    """Seconds that this rank has computed, for the log."""
    link: float | None = None
    """Bytes a second of a slower link, for benchmarks and tests: what is asked for comes over it one after the other, and no sooner."""
    _busy_until: float = 0.0
    _posts: int = 0

    def total(self) -> int:
        return sum(self.received.values())

    def due(self, nbytes: int) -> float:
        """When bytes that are asked for now are there at the earliest."""
        if self.link is None:
            return 0.0
        self._busy_until = max(self._busy_until, time.perf_counter()) + nbytes / self.link
        return self._busy_until

    def posted(self, group: dist.ProcessGroup, sent: Mapping[int, int], received: Mapping[int, int]) -> int:
        """Note bytes by peer, a rank of the group. The number under which they will be asked for."""
        self._posts += 1
        if self.log is not None:
            of_all = lambda by_peer: {dist.get_global_rank(group, peer): nbytes for peer, nbytes in by_peer.items()}
            self.log.append(Posted(self._posts, self.clock(), of_all(sent), of_all(received)))
        return self._posts

    def asked(self, what: str, number: int) -> None:
        if self.log is not None:
            self.log.append(Asked(number, self.clock(), what))

    def arrived(self, what: str, nbytes: int, started: float, asked: float, due: float) -> None:
        """Called when a rank has waited for what it asked for; waits for the slower link."""
        of_link = max(0.0, due - time.perf_counter())
        if of_link:
            time.sleep(of_link)
        if self.lanes is not None:
            self.lanes.append(Lane(what, nbytes, started, asked, time.perf_counter(), of_link))


@dataclass(frozen=True, slots=True)
class Message:
    """Tensors of one kind to or from a peer. `tensors` are what is sent, or the buffers that receive."""

    what: str
    peer: int
    tensors: tuple[Tensor, ...]


@dataclass(slots=True)
class Pending:
    """Messages on their way, or there."""

    works: Sequence[dist.Work]
    sent: Sequence[Message]
    """Kept until they are gone."""
    received: Sequence[Message]
    traffic: Traffic
    number: int
    due: float
    started: float = field(default_factory=time.perf_counter)
    over: bool = False

    def wait(self) -> dict[str, tuple[Tensor, ...]]:
        """What was received, by kind; what was sent may then be changed."""
        asked, what = time.perf_counter(), " and ".join(message.what for message in self.received)
        if self.received and not self.over:
            self.traffic.asked(what, self.number)
        for work in () if self.over else self.works:
            work.wait()
        if self.received and not self.over:
            nbytes = sum(t.nbytes for message in self.received for t in message.tensors)
            self.traffic.arrived(what, nbytes, self.started, asked, self.due)
        self.over = True
        return {message.what: message.tensors for message in self.received}


Arriving = Callable[[], list[list[Tensor]]]
"""Waits for an exchange: the tensors of each peer."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Processes of a group, numbered within it, and the counter of what passes between them."""

    group: dist.ProcessGroup | None
    rank: int
    size: int
    traffic: Traffic

    @classmethod
    def of(cls, group: dist.ProcessGroup | None = None, traffic: Traffic | None = None) -> Ranks:
        """This process among those of `group`; None: among all."""
        group = dist.group.WORLD if group is None else group
        return cls(group, dist.get_rank(group), dist.get_world_size(group), Traffic() if traffic is None else traffic)

    @classmethod
    def alone(cls, traffic: Traffic | None = None) -> Ranks:
        """This process by itself."""
        return cls(None, 0, 1, Traffic() if traffic is None else traffic)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Start all of them at once. Between two ranks, messages must be listed in the same order on both."""
        operations = [(dist.isend, m) for m in sends] + [(dist.irecv, m) for m in receives]
        nbytes, of_peers = Counter(), (Counter(), Counter())
        for messages, of_peer in zip((sends, receives), of_peers, strict=True):
            for m in messages:
                of_peer[m.peer] += sum(t.nbytes for t in m.tensors)
        for m in receives:
            nbytes[m.what] += sum(t.nbytes for t in m.tensors)
        self.traffic.received += nbytes
        number = self.traffic.posted(self.group, *of_peers)
        calls = [dist.P2POp(call, t, group=self.group, group_peer=m.peer) for call, m in operations for t in m.tensors if t.numel()]
        works, due = dist.batch_isend_irecv(calls) if calls else (), self.traffic.due(nbytes.total())
        return Pending(works, sends, receives, self.traffic, number, due)

    def all_to_all(self, what: str, sends: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[torch.Size]]) -> Arriving:
        """Start an exchange: each peer is sent its tensors and gives those of `shapes`. One collective for each dtype.

        What is returned is called to wait for them: those of each peer. Until then others may be started, in the same order on all ranks.
        """
        dtypes = [t.dtype for t in sends[0]]
        started = {
            dtype: self._all_to_all(what, *([_pick(of_peer, dtypes, dtype) for of_peer in lists] for lists in (sends, shapes)))
            for dtype in dict.fromkeys(dtypes)
        }

        def wait() -> list[list[Tensor]]:
            arrived = {dtype: [iter(of_peer) for of_peer in finish()] for dtype, finish in started.items()}
            return [[next(arrived[dtype][peer]) for dtype in dtypes] for peer in range(self.size)]

        return wait

    def _all_to_all(self, what: str, sends: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[torch.Size]]) -> Arriving:
        buffer = torch.cat([t.reshape(-1) for tensors in sends for t in tensors])
        counts = [sum(t.numel() for t in tensors) for tensors in sends]
        expected = [sum(map(torch.Size.numel, of_peer)) for of_peer in shapes]
        received, started = buffer.new_empty(sum(expected)), time.perf_counter()
        work = dist.all_to_all_single(received, buffer, expected, counts, group=self.group, async_op=True)
        from_others = (sum(expected) - expected[self.rank]) * received.itemsize
        self.traffic.received[what] += from_others
        of_others = lambda counts: {peer: n * received.itemsize for peer, n in enumerate(counts) if peer != self.rank}
        number = self.traffic.posted(self.group, of_others(counts), of_others(expected))
        due = self.traffic.due(from_others)

        def wait() -> list[list[Tensor]]:
            asked = time.perf_counter()
            self.traffic.asked(what, number)
            work.wait()
            self.traffic.arrived(what, from_others, started, asked, due)
            of_peers = [of_peer.split([s.numel() for s in shape]) for of_peer, shape in zip(received.split(expected), shapes, strict=True)]
            return [[t.view(s) for t, s in zip(of_peer, shape, strict=True)] for of_peer, shape in zip(of_peers, shapes, strict=True)]

        return wait

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, bitwise the same on all of them."""
        return self._collective(x, dist.all_reduce)

    def greatest(self, x: Tensor) -> Tensor:
        """The largest over ranks, entry by entry."""
        return self._collective(x, partial(dist.all_reduce, op=dist.ReduceOp.MAX))

    def agree(self, *values: Any) -> bool:
        """Whether all ranks have the same, as far as their `repr` tells. All of them are told the same."""
        marks = torch.tensor([crc32(repr(value).encode()) for value in values])
        return torch.equal(self.greatest(marks), -self.greatest(-marks))

    def first(self, x: Tensor) -> Tensor:
        """What rank 0 has."""
        return self._collective(x, partial(dist.broadcast, group_src=0))

    def _collective(self, x: Tensor, call: Callable[..., Any]) -> Tensor:
        """A collective of a few bytes on a copy of `x`, on a device that the group serves."""
        served = x.device if dist.get_backend(self.group) != "nccl" else torch.device("cuda", torch.cuda.current_device())
        copy = x.to(served, copy=True)
        call(copy, group=self.group)
        return copy.to(x.device)


def _pick(items: Sequence[Any], dtypes: Sequence[torch.dtype], dtype: torch.dtype) -> list[Any]:
    return [item for item, of_item in zip(items, dtypes, strict=True) if of_item is dtype]
