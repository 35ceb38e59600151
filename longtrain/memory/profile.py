"""`lt.profile`: watch a program, and write what it held.

    with lt.profile("out/memory"):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()

The directory then holds `profile.html`, which opens from disk, `profile.json`, and `profile.png` where matplotlib is installed. A program
that fails in the middle leaves the same files, with the phase it was in.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longtrain.memory.account import account
from longtrain.memory.ledger import make_ledger
from longtrain.memory.sample import Sampler
from longtrain.memory.trace import AllocatorTrace, StorageTrace, missing
from longtrain.memory.watch import Operations, Watch
from longtrain.planner.cost import Phase
from longtrain.units import parse_bytes

PAGE, DATA, PICTURE = "profile.html", "profile.json", "profile.png"


class profile:
    """A context in which memory is watched. Profiles do not nest, and not with torch's own profiler.

    path: the directory to write. `sampling`: no operation is watched one by one; every block is still counted, and belongs to a module and
    a phase but to no line (under 5% of the step's time instead of under 30%). `budget`: bytes, or text such as "24GiB", of device
    memory (on a CPU, of what is resident): drawn as a line.
    `predicted`: what `longtrain.planner.step_memory` said, shown beside what is measured. `changes`: called where the budget or the memory
    did not suffice, for what would fit. `title` heads the report. `quiet` prints nothing.

    After the context, `result` holds the report's data. Raises ValueError for a budget that is none, and for `sampling` where the C++
    extension is not there to count.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        sampling: bool = False,
        budget: str | int | None = None,
        predicted: Sequence[Phase] = (),
        changes: Callable[[], Sequence[str]] | None = None,
        title: str | None = None,
        quiet: bool = False,
    ) -> None:
        self.path, self.predicted, self.changes, self.quiet = Path(path), predicted, changes, quiet
        self.sampling, self.title = sampling, title or self.path.name
        self.budget = None if budget is None else parse_bytes(budget)
        if sampling and (why := missing()) is not None:
            raise ValueError(f"sampling counts what the allocators report, and {why}; leave sampling out")
        self.result: dict[str, Any] | None = None

    def __enter__(self) -> profile:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as started:
            trace = StorageTrace() if missing() is not None else AllocatorTrace()
            self._began = time.perf_counter_ns()
            self._watch = Watch(trace, Sampler(device))
            started.callback(trace.end)
            self._watch.start()
            if not self.sampling:
                self._operations = Operations(self._watch)
                self._operations.__enter__()
            started.pop_all()
        return self

    def __exit__(self, kind, error, _) -> None:
        watch = self._watch
        if not self.sampling:
            self._operations.__exit__(kind, error, None)
        watch.stop()
        events, ended = watch.trace.end(), time.perf_counter_ns()
        ledger = make_ledger(watch, events, self._began, ended)
        failure = None
        if error is not None:
            last = ledger.contexts[-1]
            if last.phase == "outside" and len(ledger.contexts) > 1:
                last = ledger.contexts[-2]
            where = ledger.modules[watch.raised or last.module or last.band]
            failure = {"phase": f"{last.phase} of {where}" if where else last.phase, "error": f"{kind.__name__}: {error}".splitlines()[0]}
        facts = {
            "title": self.title, "command": " ".join(sys.argv), "mode": "sampling" if self.sampling else "complete", "failure": failure,
            "seconds": (ended - self._began) / 1e9, "torch": torch.__version__, "threads": torch.get_num_threads(), "rank": rank(),
            "ranks": [], "lengths": [], "changes": [], "missing": missing(),
        }  # fmt: skip
        self.result = account(watch, ledger, predicted=self.predicted, budget=self.budget, streamed=watch.streamed, facts=facts)
        if self.changes is not None and (self.result["over_budget"] or out_of_memory(error)):
            self.result["changes"] = list(self.changes())
        if error is None and dist.is_available() and dist.is_initialized():
            self.result["ranks"] = gather({k: self.result["peak"][k] for k in ("bytes", "phase", "by_category")})
        self.write()

    def write(self, *, table_too: bool = True) -> None:
        """The files; the table is printed. In a run of several ranks each writes its own, with its number in the name."""
        from longtrain.memory.page import write_page  # here, so that `import longtrain` does not bring all that a page needs
        from longtrain.memory.picture import draw
        from longtrain.memory.table import table

        own = f"rank{rank()}-" if rank() else ""
        (self.path / f"{own}{DATA}").write_text(json.dumps(self.result), encoding="utf-8")
        write_page(self.path / f"{own}{PAGE}", self.result)
        written = [f"{own}{PAGE}", f"{own}{DATA}"]
        try:
            draw(self.path / f"{own}{PICTURE}", self.result)
            written.append(f"{own}{PICTURE}")
        except ImportError:
            if table_too and not self.quiet:
                print("no picture: matplotlib is not installed; get it with: pip install longtrain[plot]")
        if table_too and not self.quiet and not rank():
            print(table(self.result))
            print(f"{self.path} holds {', '.join(written)}", flush=True)


def rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0))


def gather(own: dict[str, Any]) -> list[dict[str, Any]]:
    """Of all ranks, on all of them: a collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an allocator, or Python, had no more to give."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator: can't allocate memory" in str(error or "")
