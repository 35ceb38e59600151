"""Training steps whose tensors live in slower tiers, while those tiers delay, reorder, split, fail and lose: right, or a clear error.

    python tools/fuzz_offload.py                              # 2,000 schedules, 1,000 faults, 20 kills: about fifteen minutes
    python tools/fuzz_offload.py --schedules 50 --faults 40 --kills 1

A case is two steps of a small model (three or four layers, six chunks, stored tensors on the device, the host and a disk) on a machine that
lets transfers go on in a drawn order (tests/offload/stepped.py); loss and gradients are compared with a step without tiers, bit by bit.

Schedules: nothing fails. Faults: one kind of `FAULTS` each, at a drawn call. Waits: each dependency between transfers is left out in turn,
and must be noticed. Kills: a real process and file, kill -9 in the midst of a step; its directory is empty, the next start is exact.
Outcomes: exact; degraded (exact, with one warning); stopped (by one error that names the tier or the setting); wrong. The table is also
written as JSON to --out. Exit status 1 where a case was wrong, a wait is not missed, or a kill left something behind.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import longtrain as lt
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.offload import TieredStore
from longtrain.offload.system import WAITS, System
from tests.offload.stepped import Faults, MemoryFile, Stepped

TOKENS, CHUNK = 83, 16
SHAPES = (
    dict(windows=(None, 13, 5), plan=dict()),
    dict(windows=(None,), plan=dict(segment_layers=2, store_outputs=0.45, store_kv=0.7)),
    dict(windows=(20, None, 40, 7), plan=dict(store_outputs=(0.0, 1.0, 0.5, 0.0), store_kv=1.0)),
    dict(windows=(None, 9, None), plan=dict(kv_block_tokens=32, store_outputs=0.6)),
)
FAULTS = ("disk full", "write error", "read error", "flipped byte", "host refused", "disk refused", "tiers too small", "disk worn")
HERE = tuple(wait for wait in WAITS if wait not in ("computed", "copied"))
"""Waits of a CPU; the two others order a GPU's streams (tools/gpu_check.py)."""

CLEAR = re.compile(r"cannot be read back|memory\.(disk|host_budget)")
"""What an error has to say."""


class Machine(Stepped):
    """One fault, at call number `at` of its kind; how often it happened is in `counts`."""

    def __init__(self, seed: int, fault: str | None, at: int, leave_out: str | None = None) -> None:
        super().__init__(seed, leave_out=leave_out, faults=Faults(short=0.3, no_direct=seed % 5 == 0))
        self.fault, self.at = fault, at
        self.calls: Counter[str] = Counter()

    def allocate(self, nbytes: int):
        if self.fault == "host refused" and len(self.at_rest) == 2:  # after the file and its slab
            self._happen(errno.ENOMEM)
        return super().allocate(nbytes)

    def open(self, path: str, nbytes: int) -> MemoryFile:
        if self.fault == "disk refused":
            self._happen(errno.ENOSPC)
        return super().open(path, nbytes)

    def pwrite(self, file: MemoryFile, data: memoryview, offset: int) -> int:
        self.calls["write"] += 1
        if self.fault == "disk full" and self.calls["write"] >= self.at:
            self._happen(errno.ENOSPC)
        if self.fault == "write error" and self.calls["write"] == self.at:
            self._happen(errno.EIO)
        flips = self.fault == "flipped byte" and self.calls["write"] == self.at
        count = super().pwrite(file, data, offset)
        if flips:
            self.flip(file.data, offset, offset + count)
        return count

    def pread(self, file: MemoryFile, data: memoryview, offset: int) -> int:
        self.calls["read"] += 1
        if self.fault == "read error" and self.calls["read"] == self.at:
            self._happen(errno.EIO)
        return super().pread(file, data, offset)

    def _happen(self, number: int) -> None:
        self.counts[self.fault] += 1
        raise OSError(number, os.strerror(number))


def make_model(shape: int) -> LanguageModel:
    torch.manual_seed(shape)
    windows = SHAPES[shape]["windows"]
    return LanguageModel(ModelConfig(
        vocab_size=61, num_layers=max(3, len(windows)), hidden_size=96, intermediate_size=64, num_heads=4, num_kv_heads=2,
        window=windows))  # fmt: skip


def step(model: LanguageModel) -> str:
    """The bits of the loss and of every gradient."""
    model.zero_grad()
    ids_BT = torch.randint(61, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    loss = model(ids_BT, labels=ids_BT).loss
    loss.backward()
    digest = hashlib.sha256(loss.detach().numpy().tobytes())
    for parameter in model.parameters():
        digest.update(parameter.grad.numpy().tobytes())
    return digest.hexdigest()


@cache
def expected(shape: int) -> str:
    """Of a step that stays on the device."""
    model = make_model(shape)
    lt.apply(model, lt.Plan(chunk_tokens=CHUNK, **SHAPES[shape]["plan"]))
    return step(model)


def draw_offload(
    draw: random.Random, layers: int, path: str, *, host: int = 1 << 20, disk: int = 1 << 21, worn: int | None = None
) -> lt.Offload:
    """Splits by kind and layer; the inputs' lie in all three tiers."""
    def split(mixed: bool) -> lt.Split:
        device, on_host = (0.2, 0.4) if mixed else draw.choice(((1.0, 0.0), (0.0, 0.0), (0.0, 1.0), (0.3, 0.3), (0.0, 0.5), (0.5, 0.0)))
        return lt.Split(device=device, host=on_host)

    splits = {kind: tuple(split(kind == "inputs") for _ in range(layers)) for kind in ("inputs", "gradients", "outputs", "kv")}
    disk_settings = lt.DiskSettings(path=path, budget=disk, max_written=worn)
    return lt.Offload(**splits, host_bytes=host, disk=disk_settings, staging_bytes=draw.choice((1 << 16, 1 << 17)))


def open_store(offload: lt.Offload, system: System) -> TieredStore:
    return TieredStore("cpu", host_bytes=offload.host_bytes, disk=offload.disk, staging_bytes=offload.staging_bytes, system=system)


def run_case(seed: int, fault: str | None = None, leave_out: str | None = None, at: int | None = None) -> tuple[str, bool]:
    """Outcome of two steps, and whether the fault happened, at call number `at` or a drawn one. Raises whatever is not a clear error."""
    draw = random.Random(seed)
    shape, small = draw.randrange(len(SHAPES)), fault == "tiers too small"
    model = make_model(shape)
    sizes = dict(host=draw.choice((1 << 12, 1 << 14)), disk=draw.choice((1 << 13, 1 << 15))) if small else {}
    offload = draw_offload(draw, len(model.model.layers), "/", **sizes, worn=draw.randrange(1 << 16) if fault == "disk worn" else None)
    machine = Machine(seed, fault, at or draw.randrange(1, 120), leave_out)
    outcomes, store, want = [], None, expected(shape)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            store = open_store(offload, machine)
            report = lt.apply(model, lt.Plan(chunk_tokens=CHUNK, offload=offload, **SHAPES[shape]["plan"]), store=store)
        except ValueError as error:
            outcomes.append(_stopped(error))
        for _ in range(2 if store else 0):
            try:
                outcomes.append("exact" if step(model) == want else "wrong")
            except RuntimeError as error:
                outcomes.append(_stopped(error))
    if store:
        outcomes += _left_behind(store)
        report.undo()
    machine.drain()
    ours = [w for w in warned if "offload:" in str(w.message)]
    degraded = store.stats.degraded if store else 0
    if len(ours) != min(1, degraded):
        outcomes.append(f"wrong: {len(ours)} warnings for {degraded} degraded extents")
    right = "stopped" if "stopped" in outcomes else "degraded" if degraded else "exact"
    worst = next((o for o in outcomes if o.startswith("wrong")), right)
    return worst, bool(machine.counts[fault]) or bool(machine.counts["flip"]) or fault in ("tiers too small", "disk worn") and degraded > 0


def _stopped(error: Exception) -> str:
    if not CLEAR.search(str(error)):
        raise error
    return "stopped"


def _left_behind(store: TieredStore) -> list[str]:
    """What should not be there after a step, as outcomes."""
    allowed = max(store.staging, 1 << 15)
    found = [f"wrong: extents left behind: {store.names()[:3]}"] if store.names() else []
    if store.stats.most_writing > allowed:
        found.append(f"wrong: {store.stats.most_writing} bytes under way, allowed {allowed}")
    store.settle()
    return found + [f"wrong: {r.used} bytes of the {tier} tier not given back" for tier, r in store.regions.items() if r.used]


def notices(seed: int, leave_out: str) -> bool:
    """Whether a case that leaves out a wait is anything but exact."""
    try:
        return run_case(seed, leave_out=leave_out)[0] != "exact"
    except (AssertionError, RuntimeError, ValueError):
        return True


# --- a real process, killed --------------------------------------------------------------------------------------------------------------


class Anywhere(System):
    """Memory will do as a disk here."""

    def filesystem(self, path: str) -> str:
        return ""


def serve(path: str) -> None:
    """Steps without end, the bits of each on a line."""
    model = make_model(0)
    offload = draw_offload(random.Random(0), 3, path)
    store = open_store(offload, Anywhere())
    lt.apply(model, lt.Plan(chunk_tokens=CHUNK, offload=offload), store=store)
    while True:
        print(step(model), flush=True)


def kills(number: int, path: str | None) -> Counter:
    """Start, wait for the first step, kill in the midst of a later one, look at the directory. Every start but one is after a kill."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=path) as directory:
        for index in range(number):
            child = subprocess.Popen([sys.executable, __file__, "--serve", directory], stdout=subprocess.PIPE, text=True)
            try:
                counts["exact" if child.stdout.readline().strip() == expected(0) else "wrong"] += 1
                time.sleep(random.Random(index).uniform(0, 0.3))
            finally:
                child.kill()
                child.wait()
                child.stdout.close()
            counts["clean" if not os.listdir(directory) else "wrong"] += 1
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=2000)
    parser.add_argument("--faults", type=int, default=1000, help="cases, in turn of each kind")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--waits", type=int, default=200, help="schedules at most that leave out a wait, until three have noticed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--path", help="a directory for the killed processes' files; the system's for temporary files when not given")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz_offload.json")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.serve:
        serve(a.serve)
    rows: dict[str, Counter] = {"no fault": Counter()}
    for index in counted("schedules", a.schedules):
        rows["no fault"].update(("drawn", run_case(a.seed + index)[0]))
    for index in counted("faults", a.faults):
        fault = FAULTS[index % len(FAULTS)]
        outcome, happened = run_case(a.seed + 10**6 + index, fault)
        rows.setdefault(fault, Counter()).update(("drawn", outcome, *(["happened"] if happened else [])))
    caught = {wait: caught_of(wait, a.seed, a.waits) for wait in HERE} if a.waits else {}
    killed = kills(a.kills, a.path)
    columns = ("drawn", "happened", "exact", "degraded", "stopped", "wrong")
    for row in rows.values():
        row["wrong"] = sum(n for outcome, n in row.items() if outcome.startswith("wrong"))
    print(f"{'':16}" + "".join(f"{c:>10}" for c in columns))
    for name, row in rows.items():
        print(f"{name:16}" + "".join(f"{row[c]:>10}" for c in columns))
    for wait, (n, seeds) in caught.items():
        print(f"left out: {wait:8} noticed by {n} of {seeds} schedules ({WAITS[wait]})")
    print(f"kill -9: {a.kills} killed, {killed['clean']} left nothing behind, {killed['exact']} starts exact")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps({"rows": rows, "waits left out: noticed by, of": caught, "kills": killed}, indent=1) + "\n")
    missed = [wait for wait, (n, _) in caught.items() if not n]
    return int(any(row["wrong"] for row in rows.values()) or bool(missed) or killed["wrong"] > 0)


def counted(what: str, number: int) -> Iterator[int]:
    """Indices, and on the terminal how far they are."""
    began = time.monotonic()
    for index in range(number):
        yield index
        if (index + 1) % 50 == 0:
            print(f"{what}: {index + 1} of {number}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def caught_of(wait: str, seed: int, most: int, enough: int = 3) -> tuple[int, int]:
    """How many of how many schedules noticed that `wait` was left out; no more are run than give `enough`."""
    noticed = 0
    for index in range(most):
        noticed += notices(seed + index, wait)
        if noticed == enough:
            return noticed, index + 1
    return noticed, most


if __name__ == "__main__":
    sys.exit(main())
