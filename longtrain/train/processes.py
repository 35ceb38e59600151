"""The processes of a run, as torchrun starts them: how they meet, agree, and end together. One process by itself is the case without.

What concerns the model (which of them share a sequence, or parameters) is in `distribute.py`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from longtrain.errors import RunError
from longtrain.train.watch import LIMIT, Watch

MEET = timedelta(minutes=5)
"""How long processes that were started wait for the others."""
COLLECTIVE = timedelta(hours=6)
"""Of a single collective; that one is stuck is found by `Watch`, by what the run is doing."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """`rank` of `size`, number `local` on its machine. All ranks call the methods, in the same order."""

    rank: int = 0
    size: int = 1
    local: int = 0
    group: dist.ProcessGroup | None = None
    """gloo, for what the main thread has to agree on."""
    saving: dist.ProcessGroup | None = None
    """gloo, for checkpoints, which another thread writes."""
    watch: Watch | None = None

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes. What it raises ends the job."""
        if self.size == 1:
            return make()
        box = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """What each rank has, by rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=self.group)
        return box

    def sum(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.SUM)

    def greatest(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], op: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=op, group=self.group)
        return tensor.tolist()

    def check_same(self, said: dict[str, Any], remedy: str) -> None:
        """Raise RunError on all ranks that names what is not the same on one of them."""
        found = self.gather(said)
        differ = [
            f"{name} is {other.get(name)} on rank {rank} and {found[0].get(name)} on rank 0"
            for name in dict.fromkeys(name for of_rank in found for name in of_rank)
            for rank, other in enumerate(found)
            if other.get(name) != found[0].get(name)
        ]
        if differ:
            more = f", and {len(differ) - 5} more" if len(differ) > 5 else ""
            raise RunError(f"the ranks were not given the same: {'; '.join(differ[:5])}{more}; {remedy}")

    def doing(self, what: str, limit: float = LIMIT) -> None:
        """What errors that end the job should say; `limit`: seconds in which it must get ahead."""
        if self.watch is not None:
            self.watch.doing(what, limit)

    def moved(self) -> None:
        if self.watch is not None:
            self.watch.moved()


ALONE = Processes()


@contextlib.contextmanager
def join(explain: Callable[[BaseException], tuple[str, int] | None]) -> Iterator[Processes]:
    """Meet the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), by `env://` or by the URL in LONGTRAIN_MEET.

    Whatever is raised inside, by one or all, ends all of them: rank 0 prints what `explain` says of it, and they exit with its code.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield ALONE
        return
    if "RANK" not in os.environ:
        found = f"WORLD_SIZE is {size} and RANK is not set"
        raise RunError(f"{found}; start {size} processes with torchrun, which numbers them, or unset WORLD_SIZE")
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    try:
        store, _, _ = next(rendezvous(os.environ.get("LONGTRAIN_MEET", "env://"), rank, size, timeout=MEET))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps the store when it starts all ranks again
        store = dist.PrefixStore(f"attempt {attempt}", store)
        watch = Watch(store, rank, size)
        watch.start(MEET)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"rank {rank}: the {size} processes did not meet ({error}); start all of them, as torchrun does") from error
    if rank:
        sys.stdout = open(os.devnull, "w")
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() > local else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE)
        group, saving = (dist.new_group(backend="gloo", timeout=COLLECTIVE) for _ in range(2))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # a stand-in is a view, and nothing writes into it
            yield Processes(rank, size, local, group, saving, watch)
        watch.doing("ending")
        dist.barrier(group)
    except BaseException as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # what its collectives say when a process has gone
            watch.lost(error)
        if said := explain(error):
            watch.end(*said)
        watch.end("".join(traceback.format_exception(error)), 1)
    watch.close()
    dist.barrier(group)  # the store may go with rank 0
    dist.destroy_process_group()
