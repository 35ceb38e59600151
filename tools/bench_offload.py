"""Bandwidth of the token store's disk tier against the raw disk under the same pattern; a step with and without the disk.

    python tools/bench_offload.py --path /scratch
    python tools/bench_offload.py --path /scratch --bytes 256MiB --extent 1MiB --rounds 3
    python tools/bench_offload.py step --path /scratch          # memory and time of a training step: see bench_offload_step.py

Raw: as many threads, O_DIRECT, the same blocks in the same order into a file made the same way, written from the pages of the very memory
that the store writes from and read into buffers that the store hands out, as many as it fetches ahead (virtual machines have faster and
slower memory, and a buffer that stays in the cache is faster): what the disk gives, without checksums, copies or states. Writing goes up
the file, reading comes down it, as in a training step. Store and raw disk take turns, first one first and then the other; medians over
rounds of the ratio within a round. One round before warms both up and compares every byte that the store gives back; no number is printed
unless they agree. Where fio is installed, its figure stands beside. The table is also written as JSON to --out. Exit status 1 where a ratio
is below --bound.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import bench_offload_step
from step_process import machine

from longtrain.offload import DiskSettings, Place, TieredStore
from longtrain.offload.disk import check_disk
from longtrain.offload.regions import ALIGNMENT
from longtrain.offload.system import System
from longtrain.span import chunk_spans
from longtrain.units import format_bytes, parse_bytes

WIDTH = 1024  # values of a token; a token is 4 KiB


class Raw:
    """The disk without the store."""

    def __init__(self, path: str, memory: np.ndarray, extent: int, block: int, threads: int, store: TieredStore) -> None:
        self.system, nbytes = System(threads), memory.nbytes
        self.blocks = [(at + b, min(block, extent - b)) for at in range(0, nbytes, extent) for b in range(0, extent, block)]
        self.file = self.system.open(path, nbytes)
        self.system.direct(self.file, True)
        self.data, self.extent, self.store = memoryview(memory), extent, store
        self.pool = ThreadPoolExecutor(threads)

    def move(self, call: Callable, blocks: list[tuple[int, int]], memory: Callable[[int, int], memoryview]) -> None:
        def one(at: int, size: int) -> None:
            if call(self.file, memory(at, size), at) != size:
                raise OSError(f"a short transfer at offset {at}")

        for done in [self.pool.submit(one, *block) for block in blocks]:
            done.result()

    def write(self) -> None:
        self.move(self.system.pwrite, self.blocks, lambda at, size: self.data[at : at + size])

    def read(self) -> None:
        ahead = [
            memoryview(self.store._traffic.copies.buffer(self.extent, 0).numpy()) for _ in range(self.store.staging // self.extent or 1)
        ]

        def memory(at: int, size: int) -> memoryview:
            return ahead[at // self.extent % len(ahead)][at % self.extent :][:size]

        self.move(self.system.pread, self.blocks[::-1], memory)


class Stored:
    """The same through the store."""

    def __init__(self, path: str, memory: np.ndarray, extent: int, staging: int, threads: int) -> None:
        tokens = memory.nbytes // (4 * WIDTH) - 1
        # As torch's allocator gives it: not where a page begins.
        self.x = torch.from_numpy(memory[64:][: 4 * WIDTH * tokens].view(np.float32)).view(1, tokens, WIDTH).normal_()
        self.spans = chunk_spans(tokens, extent // (4 * WIDTH))
        budget = memory.nbytes + len(self.spans) * ALIGNMENT  # extents begin in a page of the file where they do in memory
        self.store = TieredStore("cpu", disk=DiskSettings(path=path, budget=budget), staging_bytes=staging, system=System(threads))

    def write(self) -> None:
        for span in self.spans:
            self.store.put("x", span, self.x[:, span.slice()], Place(tier="disk"))
        self.store.settle()

    def read(self, compare: bool = False) -> None:
        self.store.prefetch([("x", span) for span in reversed(self.spans)])
        for span in reversed(self.spans):
            found = self.store.get("x", span)
            if compare and not torch.equal(found, self.x[:, span.slice()]):
                raise SystemExit(f"no numbers, since {span} came back different")
        self.store.release("x")


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["step"]:
        return bench_offload_step.main(given[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=".", help="a directory on the disk")
    parser.add_argument("--bytes", type=parse_bytes, default=parse_bytes("1GiB"), help="written and read in a round")
    parser.add_argument("--extent", type=parse_bytes, default=parse_bytes("8MiB"), help="put at a time, a multiple of 4KiB")
    parser.add_argument("--staging", type=parse_bytes, default=parse_bytes("128MiB"), help="the store's staging_bytes")
    parser.add_argument("--threads", type=int, default=System().threads, help="of the store, and of the raw disk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bound", type=float, default=0.9)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "benchmarks" / "bench_offload.json")
    a = parser.parse_args(given)
    if a.extent % ALIGNMENT:
        parser.error(f"--extent: {a.extent} is no multiple of {ALIGNMENT}")
    a.bytes -= a.bytes % a.extent
    if not a.bytes:
        parser.error("--bytes: less than one --extent")
    check_disk(DiskSettings(path=a.path, budget=2 * a.bytes))
    memory = System().allocate(a.bytes)
    stored = Stored(a.path, memory, a.extent, a.staging, a.threads)
    block, threads = stored.store.block_bytes, a.threads
    raw = Raw(a.path, memory, a.extent, block, threads, stored.store)
    for warm_up in (raw.write, raw.read, stored.write, lambda: stored.read(compare=True)):
        warm_up()
    rounds = [measure(raw, stored, first=index % 2) for index in range(a.rounds)]
    rows = {what: summary([r[what] for r in rounds], a.bytes) for what in ("write", "read")}
    sizes = f"{format_bytes(a.bytes)} in extents of {format_bytes(a.extent)}, blocks of at most {block >> 10} KiB"
    print(f"{a.path}: {sizes}, {threads} threads, O_DIRECT")
    for what, row in rows.items():
        print(f"{what:<6} raw {row['raw']:.2f} GB/s   store {row['store']:.2f} GB/s   {row['ratio']:.3f}x   "
              f"processor {row['processor']:.2f} s a GB (raw {row['raw_processor']:.2f})")
    beside = fio(a.path, block, threads, a.bytes)
    print(beside or "fio is not installed: no third figure")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", "tools/bench_offload.py", *given])
    a.out.write_text(json.dumps({"command": command, "machine": machine(), "rows": rows, "rounds": rounds, "fio": beside}, indent=1) + "\n")
    return int(any(row["ratio"] < a.bound for row in rows.values()))


def measure(raw: Raw, stored: Stored, first: int) -> dict:
    """Seconds, and processor seconds, of each in one round."""
    taken: dict[str, dict[str, tuple[float, float]]] = {}
    for what in ("write", "read"):
        taken[what] = {}
        for name, side in [("raw", raw), ("store", stored)][:: -1 if first else 1]:
            wall, processor = time.perf_counter(), time.process_time()
            getattr(side, what)()
            taken[what][name] = (time.perf_counter() - wall, time.process_time() - processor)
    return taken


def summary(rounds: list[dict], nbytes: int) -> dict[str, float]:
    def rate(name: str, which: int) -> float:
        return statistics.median(r[name][which] for r in rounds) * 1e9 / nbytes

    ratio = statistics.median(r["raw"][0] / r["store"][0] for r in rounds)
    return {
        "raw": 1 / rate("raw", 0),
        "store": 1 / rate("store", 0),
        "ratio": ratio,
        "processor": rate("store", 1),
        "raw_processor": rate("raw", 1),
    }


def fio(path: str, block: int, threads: int, nbytes: int) -> str | None:
    """What fio reaches with as many jobs of the same blocks."""
    if shutil.which("fio") is None:
        return None
    lines, size = [], nbytes // threads // block * block or block
    for what in ("write", "read"):
        out = subprocess.run(
            ["fio", "--name=bench", f"--directory={path}", f"--rw={what}", f"--bs={block}", f"--size={size}",
             f"--numjobs={threads}", "--direct=1", "--ioengine=psync", "--group_reporting", "--unlink=1", "--output-format=json"],
            check=True, capture_output=True, text=True).stdout
        lines.append(f"{what} {json.loads(out)['jobs'][0][what]['bw_bytes'] / 1e9:.2f} GB/s")
    return "fio: " + ", ".join(lines)


if __name__ == "__main__":
    sys.exit(main())
