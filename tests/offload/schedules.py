"""Random schedules of a token store, every get compared bit by bit with a copy that was taken at put."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from longtrain.offload import DiskSettings, Place, TieredStore
from longtrain.span import Span, chunk_spans
from tests.offload.stepped import Faults, Stepped

TIERS = ("device", "host", "disk")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.bool)


def make_store(system: Stepped, draw: random.Random, *, host: int = 1 << 19, disk: int = 1 << 21) -> TieredStore:
    staging = draw.choice((1 << 16, 1 << 17))
    return TieredStore("cpu", host_bytes=host, disk=DiskSettings(path="/", budget=disk), staging_bytes=staging, system=system)


class Schedule:
    """A store, what it must hold, and random calls. `get` returns whether the store could answer."""

    def __init__(self, store: TieredStore, draw: random.Random, *, layers: int, tokens: int, chunk: int) -> None:
        self.store, self.draw = store, draw
        self.spans = chunk_spans(tokens, chunk)
        self.dtypes = {f"layer {i}": draw.choice(DTYPES) for i in range(layers)}
        self.width = draw.choice((3, 33, 200, 200))
        self.batch = draw.choice((1, 1, 2))
        self.shadow: dict[str, dict[Span, Tensor]] = {name: {} for name in self.dtypes}
        self.sources: dict[str, dict[Span, Tensor]] = {name: {} for name in self.dtypes}
        self.tiers = draw.choice((TIERS, ("host", "disk"), ("disk",)))
        self.compared = 0
        self.largest = 0

    def tensor(self, span: Span, dtype: torch.dtype) -> Tensor:
        """Random values, in one of the shapes that memory takes."""
        g = torch.Generator().manual_seed(self.draw.randrange(2**31))
        n, kind = len(span), self.draw.choice(("dense", "dense", "transposed", "slice", "strided", "expanded"))
        B, W = self.batch, self.width
        whole = torch.randint(0, 2**15, (B, n + 3, 2 * W), generator=g).to(dtype)
        if kind == "dense":
            return whole[:, :n, :W].contiguous()
        if kind == "transposed":
            return whole[:, :n, :W].transpose(1, 2).contiguous().transpose(1, 2)
        if kind == "slice":
            return whole[:, 2 : n + 2, :W]
        if kind == "strided":
            return whole[:, :n, ::2]
        return whole[:, :1, :W].expand(B, n, W)

    def put(self, name: str, span: Span) -> None:
        twins = [t for own in self.sources.values() for s, t in own.items() if len(s) == len(span) and t.dtype == self.dtypes[name]]
        tensor = self.draw.choice(twins) if twins and self.draw.random() < 0.2 else self.tensor(span, self.dtypes[name])
        self.largest = max(self.largest, tensor.nbytes)
        self.shadow[name][span] = tensor.clone()
        self.store.put(name, span, tensor, Place(tier=self.draw.choice(self.tiers)))
        if self.draw.random() < 0.5:
            self.sources[name][span] = tensor

    def get(self, name: str, span: Span) -> None:
        expected = torch.cat([t[:, (s & span).slice(s.start)] for s, t in sorted(self.shadow[name].items()) if len(s & span)], dim=1)
        found = self.store.get(name, span)
        assert found.dtype == expected.dtype and torch.equal(found, expected), f"{name} at {span} differs"
        self.compared += 1

    def release(self, name: str, span: Span) -> None:
        self.store.release(name, span)
        del self.shadow[name][span]
        source = self.sources[name].pop(span, None)
        if source is not None and source.is_contiguous() and not self._shared(source):
            source.zero_()  # its owner may do what it likes now, even while a write of it is still under way

    def _shared(self, source: Tensor) -> bool:
        """Whether it may have been put under another name as well."""
        return any(t.dtype == source.dtype and torch.equal(t, source) for own in self.shadow.values() for t in own.values())

    def held(self) -> list[tuple[str, Span]]:
        return [(name, span) for name, own in self.shadow.items() for span in own]

    def some_span(self, name: str, span: Span) -> Span:
        """All of an extent, part of it, or a stretch over its neighbours."""
        kind = self.draw.choice(("all", "part", "stretch"))
        if kind == "all":
            return span
        stop = span.stop
        while kind == "stretch" and (after := next((s for s in self.shadow[name] if s.start == stop), None)):
            stop = after.stop
        a, b = sorted((self.draw.randrange(span.start, stop), self.draw.randrange(span.start, stop)))
        return Span(a, b + 1)

    def soup(self, calls: int) -> None:
        """Any call at any time."""
        for _ in range(calls):
            held, call = self.held(), self.draw.random()
            name = self.draw.choice(list(self.dtypes))
            empty = [s for s in self.spans if s not in self.shadow[name]]
            if call < 0.35 and empty:
                self.put(name, self.draw.choice(empty))
            elif call < 0.65 and held:
                name, span = self.draw.choice(held)
                self.get(name, self.some_span(name, span))
            elif call < 0.8 and held:
                name, span = self.draw.choice(held)
                self.release(name, span)
                self.put(name, span)
            elif call < 0.9 and held:
                self.store.prefetch([self.draw.choice([*held, ("nobody", Span(0, 3))]) for _ in range(self.draw.randrange(1, 6))])
            elif held:
                self.release(*self.draw.choice(held))

    def training_step(self) -> None:
        """Layers forward, chunk by chunk; then backward, chunks reversed, announced in that order, each taken once."""
        for name in self.dtypes:
            for span in self.spans:
                if span in self.shadow[name]:
                    self.release(name, span)
                self.put(name, span)
        backward = [(name, span) for name in reversed(self.dtypes) for span in reversed(self.spans)]
        cut = self.draw.randrange(len(backward))
        self.store.prefetch(backward[:cut])
        for index, (name, span) in enumerate(backward):
            if index == cut // 2:
                self.store.prefetch(backward[cut:])
            self.get(name, span)
            self.release(name, span)

    def finish(self) -> None:
        """Everything is still right, nothing is left, and staging was kept to."""
        for name, span in self.held():
            self.get(name, span)
            self.release(name, span)
        assert self.store.names() == []
        self.store.close()
        for tier, regions in self.store.regions.items():
            assert regions.used == 0, f"{regions.used} bytes of the {tier} tier were never given back"
        allowed = max(self.store.staging, self.largest)
        assert self.store.stats.most_writing <= allowed, f"{self.store.stats.most_writing} bytes under way, allowed {allowed}"


def run_schedule(seed: int, *, leave_out: str | None = None, faults: Faults = Faults()) -> Schedule:
    """One store, a random schedule. Raises AssertionError, or what the store raises."""
    draw = random.Random(seed)
    system = Stepped(seed, leave_out=leave_out, faults=faults)
    tokens, chunk = draw.choice(((7, 1), (40, 3), (61, 8), (40, 8), (13, 3)))
    schedule = Schedule(make_store(system, draw), draw, layers=draw.randrange(3, 5), tokens=tokens, chunk=chunk)
    try:
        schedule.soup(40)
        schedule.training_step()
        schedule.finish()
        assert schedule.store.stats.degraded == 0
    finally:
        system.drain()
    return schedule
