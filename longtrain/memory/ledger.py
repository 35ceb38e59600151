"""The ledger: every block of memory with who took it and what it held, made from what `watch.py` wrote down.

A block is what an allocator gave out between two events. Where it was labelled (a parameter, a gradient, an extent of the token store) it
is that. Otherwise the operation in which it was taken says where it comes from, and its life says what it is: what outlives its module
in a forward pass (or in a replay of one) is an activation, everything else is workspace. A block that was taken in no operation that was
seen and holds nothing that was recognised is unattributed: the residual.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from longtrain.memory.contexts import FOREVER, Context, make_contexts, next_backward
from longtrain.memory.trace import StorageTrace
from longtrain.memory.watch import Watch
from longtrain.offload.extent import State

CATEGORIES = (
    "parameters", "gradients", "optimizer", "activations", "carry", "workspace", "staging", "communication", "data", "other",
    "unattributed",
)  # fmt: skip
"""`data`: what models are given. `other`: tensors that were there before the profile began and are none of the others."""

PRECEDENCE = ("parameters", "gradients", "optimizer", "activations", "data")
"""Of the labels that a block may be given."""

PLACES = {
    "longtrain/stream/sliding.py": "carry",
    "longtrain/stream/replay.py": "gradients",
    "longtrain/offload/host.py": "staging",
    "longtrain/offload/extent.py": "staging",
}
"""Files of this package whose allocations are one thing only: the carries' buffers, sums of gradients, copies on their way to a tier."""

PACKAGE = Path(__file__).resolve().parents[2]
LARGE = 1 << 20
"""Bytes from which on a tensor that was there before is a line of its own."""


@dataclass(slots=True, kw_only=True)
class Ledger:
    """Blocks, one a row of each array: events at which they begin and end (-1: before the profile; FOREVER: still there)."""

    start: np.ndarray
    stop: np.ndarray
    nbytes: np.ndarray
    device: np.ndarray
    item: np.ndarray
    """Its number in `items`."""
    items: list[Item]
    contexts: list[Context]
    nanoseconds: np.ndarray
    """When each event was."""
    modules: list[str]
    scratch_unseen: bool
    """Whether scratch memory inside kernels is not in it."""
    began: int
    ended: int
    levels: dict[int, np.ndarray] = field(default_factory=dict)

    def level(self, device: int) -> np.ndarray:
        """Bytes on a device after each event; the first number is what was there before any."""
        if device not in self.levels:
            self.levels[device] = self._running(self.device == device)
        return self.levels[device]

    def _running(self, which: np.ndarray) -> np.ndarray:
        change = np.zeros(len(self.nanoseconds) + 1, np.int64)
        np.add.at(change, self.start[which] + 1, self.nbytes[which])
        gone = which & (self.stop != FOREVER)
        np.subtract.at(change, self.stop[gone] + 1, self.nbytes[gone])
        return np.cumsum(change)

    def running(self, device: int, items: Sequence[int]) -> np.ndarray:
        """Bytes in some items after each event."""
        return self._running((self.device == device) & np.isin(self.item, items))

    def alive(self, device: int, moment: int) -> np.ndarray:
        """Bytes of every item after `moment` events."""
        here = (self.device == device) & (self.start < moment) & (self.stop >= moment)
        return np.bincount(self.item[here], weights=self.nbytes[here], minlength=len(self.items)).astype(np.int64)

    def counts(self, device: int, moment: int) -> np.ndarray:
        """Blocks of every item after `moment` events."""
        here = (self.device == device) & (self.start < moment) & (self.stop >= moment)
        return np.bincount(self.item[here], minlength=len(self.items))


@dataclass(frozen=True, slots=True)
class Item:
    """Blocks that are one line of a report."""

    category: str
    name: str
    """What it holds, or the operation that made it."""
    module: str = ""
    line: str = ""
    """File, line and function."""
    shape: str = ""
    dtype: str = ""


def make_ledger(watch: Watch, events: np.ndarray, began: int, ended: int) -> Ledger:
    table = blocks(watch, events)
    start, stop, nbytes, device, address = (column.copy() for column in table.T)
    contexts = make_contexts(watch)
    labels = find_labels(watch, address, device, start, stop)
    numbers: dict[Item, int] = {}

    # Which operation each block was taken in, in which context, and whether it outlives the one and the other.
    operations = np.concatenate([np.frombuffer(watch.operations, np.int64).reshape(-1, 3), [[FOREVER, FOREVER, -1]]])
    at = np.searchsorted(operations[:, 0], start, side="right") - 1
    seen = (at >= 0) & (start < operations[at, 1])
    site = np.where(seen, operations[at, 2], -1)
    scratch = seen & (stop < operations[at, 1])
    context = np.searchsorted([c.start for c in contexts], start, side="right") - 1
    next_begins = zip(contexts, next_backward(contexts), strict=True)
    ends = np.array([c.leaves if c.module or c.phase != "forward" else begin for c, begin in next_begins])
    outlives = stop > ends[context]
    before = start < watch.first

    made = list(watch.sites)
    cache: dict[tuple, int] = {}
    item = np.empty(len(start), np.int64)
    rows = zip(site.tolist(), context.tolist(), outlives.tolist(), scratch.tolist(), before.tolist(), nbytes.tolist(), strict=True)
    for i, (where, c, outlasts, inside, old, size) in enumerate(rows):
        found, label = contexts[c], labels.get(i)
        was = watch.at_start[i][3] if old and i < len(watch.at_start) and (size >= LARGE or watch.at_start[i][0] < 0) else ""
        key = (label, was, where, found.module, found.band, found.phase, outlasts, inside, old, size)
        if (number := cache.get(key)) is None:
            what = describe(watch, label, None if where < 0 else made[where], found, outlasts, inside, size, old, was)
            number = cache[key] = numbers.setdefault(what, len(numbers))
        item[i] = number
    if watch.sampler.device.type == "cpu":
        rows = [(a, b, n, numbers.setdefault(Item("staging", label), len(numbers))) for a, b, n, label in fetched(watch, events[:, 0])]
        more = np.array(rows, np.int64).reshape(-1, 4).T
        start, stop, nbytes, item = (np.concatenate(pair) for pair in zip((start, stop, nbytes, item), more, strict=True))
        device = np.concatenate((device, np.full(len(rows), -1)))
    return Ledger(
        start=start, stop=stop, nbytes=nbytes, device=device, item=item, items=list(numbers), contexts=contexts,
        nanoseconds=events[:, 0], modules=watch.modules, scratch_unseen=isinstance(watch.trace, StorageTrace), began=began, ended=ended,
    )  # fmt: skip


def describe(watch: Watch, label, site, context: Context, outlives: bool, scratch: bool, nbytes: int, before: bool, was: str) -> Item:
    """What a block is."""
    module = watch.modules[context.module] or watch.modules[context.band]
    if site is None:
        line = shape = dtype = operation = ""
    else:
        func, path, number, function, made = site
        line, operation = f"{short_path(path)}:{number} {function}", str(func).removesuffix(".default").removeprefix("aten.")
        shapes = [(s, d) for size, s, d in made if size == nbytes]
        shape, dtype = (str(list(shapes[0][0])), str(shapes[0][1]).removeprefix("torch.")) if shapes and not scratch else ("", "")
    if label is not None:
        category, name = label
        return Item(category, name, "" if category != "activations" else module, line, shape, dtype)
    if was == "not found":
        return Item("unattributed", "there before the profile began, in no tensor")
    if before:
        return Item("other", f"there before the profile began{was and ': '}{was}")
    if site is None:
        if not watch.operations and (module or context.phase != "outside"):  # not every operation was watched: the module is what is known
            return Item("activations" if outlives and context.phase != "optimizer" else "workspace", f"taken in {context.phase}", module)
        return Item("unattributed", f"taken in {context.phase}", module)
    if str(func).startswith(("c10d", "_c10d_functional")):
        return Item("communication", operation, module, line, shape, dtype)
    place = PLACES.get(short_path(path))
    if place is not None and not scratch:
        return Item(place, operation, module, line, shape, dtype)
    if scratch:
        return Item("workspace", f"inside {operation}", module, line)
    replayed = context.phase == "backward" and context.module
    if outlives and (context.phase == "forward" or replayed):
        return Item("activations", operation, module, line, shape, dtype)
    return Item("workspace", operation, module, line, shape, dtype)


def blocks(watch: Watch, events: np.ndarray) -> np.ndarray:
    """(start, stop, bytes, device, address) of every block, those that were there before first."""
    rows: list[list[int]] = [[-1, FOREVER, nbytes, device, address] for address, nbytes, device, _ in watch.at_start]
    alive = {(device, address): i for i, (_, _, _, device, address) in enumerate(rows)}
    for i, (_, address, nbytes, device) in enumerate(events.tolist()):
        key = (device, address)
        if nbytes < 0:
            if (block := alive.pop(key, None)) is not None:
                rows[block][1] = i
        else:
            if (block := alive.get(key)) is not None:  # it was given back in a thread that is not watched
                rows[block][1] = i
            alive[key] = len(rows)
            rows.append([i, FOREVER, nbytes, device, address])
    # What was labelled and no allocator gave out: files mapped into memory, arrays of other libraries.
    others: dict[tuple[int, int], list[int]] = {}
    known = {(device, address) for _, _, _, device, address in rows}
    for moment, address, nbytes, device, _ in labelled(watch):
        if (device, address) not in known:
            others.setdefault((device, address), [moment - 1, moment, nbytes])[1] = moment
    last = len(events)
    for (device, address), (start, stop, nbytes) in others.items():
        rows.append([start, FOREVER if stop == last else stop, nbytes, device, address])
    return np.array(rows, np.int64).reshape(-1, 5)


def labelled(watch: Watch) -> list[list[int]]:
    return np.frombuffer(watch.labelled, np.int64).reshape(-1, 5).tolist()


def fetched(watch: Watch, nanoseconds: np.ndarray) -> Iterator[tuple[int, int, int, str]]:
    """(start, stop, bytes, what) of what a CPU's token store read back into memory of its own, from the store's account of it."""
    began: dict[int, tuple[int, int, str]] = {}
    for event in watch.sampler.events:
        moment = int(np.searchsorted(nanoseconds, event.seconds * 1e9)) - 1
        if event.after is State.READING:
            began[event.extent] = moment, event.nbytes, event.label.split(" at Span")[0]
        elif event.after in (State.STORED, State.RELEASED, State.FAILED) and event.extent in began:
            start, nbytes, label = began.pop(event.extent)
            yield start, moment, nbytes, label
    for start, nbytes, label in began.values():
        yield start, FOREVER, nbytes, label


def find_labels(watch: Watch, address, device, start, stop) -> dict[int, tuple[str, str]]:
    """The label of each block that has one."""
    of_address: dict[tuple[int, int], list[int]] = {}
    for i, key in enumerate(zip(device.tolist(), address.tolist(), strict=True)):
        of_address.setdefault(key, []).append(i)
    texts = list(watch.labels)
    found: dict[int, tuple[str, str]] = {}
    for moment, where, _, which, number in labelled(watch):
        candidates = of_address.get((which, where), ())
        at = bisect_right(candidates, moment - 1, key=lambda i: start[i]) - 1
        if at < 0 or stop[candidates[at]] < moment:
            continue
        block, label = candidates[at], texts[number]
        if block not in found or PRECEDENCE.index(label[0]) < PRECEDENCE.index(found[block][0]):
            found[block] = label
    return found


def short_path(path: str) -> str:
    """As a reader knows it: from the package on, or from the working directory."""
    if "site-packages/" in path:
        return path.rsplit("site-packages/", 1)[1]
    if path.startswith(f"{PACKAGE}/longtrain/"):
        return path[len(str(PACKAGE)) + 1 :]
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
