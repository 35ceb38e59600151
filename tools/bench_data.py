"""Speed and memory of the data path: building beside `cat | wc` of the same files, packing a million documents, loading.

    python tools/bench_data.py                # 1 GiB of text; about two minutes and 4 GiB of disk, on a quiet machine
    python tools/bench_data.py --mib 256      # on a machine with other work look at processor seconds only
    python tools/bench_data.py --mib 8        # does it run?

The text is the running Python's standard library again and again: files of 1 MiB, and JSONL of short documents. Processor seconds are
user's and system's of all threads; memory is the peak while building, above what the imports take. `cat | wc` is the best of three.
Loading shows what updates wait for their data, without a step in between and with steps that only read.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from longtrain.config.data import DataConfig, TokenSource
from longtrain.config.run import LengthStage
from longtrain.data.packing import best_fit, concatenate, cut
from longtrain.data.sources import read_stdlib
from longtrain.train.loader import Loader, open_data

PIECE = 2**20
SHORT = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="text to build from (1024)")
    parser.add_argument("--documents", type=int, default=1_000_000, help="to pack (1000000)")
    parser.add_argument("--updates", type=int, default=50, help="to load (50)")
    parser.add_argument("--dir", help="where to write; a temporary directory by default, removed in the end")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as made:
        directory = Path(made)
        write_inputs(directory, args.mib)
        build_rows(directory, args.mib)
        load_rows(directory / "built-text", args.updates)
    pack_rows(args.documents)


def write_inputs(directory: Path, mib: int) -> None:
    """`text/*.txt` of 1 MiB each, and `short.jsonl` of a quarter of that in documents of 2,000 bytes."""
    source = b"".join(d.tokens.tobytes() for d in read_stdlib()).decode("utf-8", "ignore").encode("ascii", "ignore").replace(b"\0", b"")
    (directory / "text").mkdir()
    for index in range(mib):
        at = index * PIECE % (len(source) - PIECE)
        (directory / "text" / f"{index:05}.txt").write_bytes(source[at : at + PIECE])
    with open(directory / "short.jsonl", "w") as file:
        for index in range(max(1, mib // 4) * PIECE // SHORT):
            at = index * SHORT % (len(source) - SHORT)
            file.write(json.dumps({"text": source[at : at + SHORT].decode()}) + "\n")


BUILD = """
import io, sys, time, torch
from pathlib import Path
from longtrain.data.build import Settings, build
from longtrain.train.peak_memory import read_peak, reset_peak
reset_peak(torch.device("cpu"))
before, wall, processor = read_peak(torch.device("cpu")), time.monotonic(), time.process_time()
build(Path(sys.argv[1]), [sys.argv[2]], Settings(), io.StringIO())
print(time.monotonic() - wall, time.process_time() - processor, read_peak(torch.device("cpu")) - before)
"""


def build_rows(directory: Path, mib: int) -> None:
    """In a process of its own, imports left out."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name, inputs, size in (("text", "text", mib), ("short", "short.jsonl", max(1, mib // 4))):
        files = f"{shlex.quote(str(directory))}/{inputs}" + ("/*" if name == "text" else "")
        wc = min((time_pipeline(f"cat {files} | wc") for _ in range(3)), key=lambda times: times[1])
        command = [sys.executable, "-c", BUILD, str(directory / f"built-{name}"), str(directory / inputs)]
        printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        wall, processor, memory = map(float, printed.split())
        print(
            f"build {inputs:<12} {size:>5} MiB   "
            f"processor {processor:6.2f} s, cat | wc {wc[1]:6.2f} s: {wc[1] / processor:4.2f} times its speed   "
            f"wall {wall:6.2f} s, cat | wc {wc[0]:6.2f} s: {wc[0] / wall:4.2f}   memory {memory / 2**20:.0f} MiB",
            flush=True,
        )


def time_pipeline(command: str) -> tuple[float, float]:
    """Wall and processor seconds of a shell command."""
    began = time.monotonic()
    process = subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.DEVNULL)
    _, _, used = os.wait4(process.pid, 0)
    return time.monotonic() - began, used.ru_utime + used.ru_stime


def load_rows(built: Path, updates: int) -> None:
    data = DataConfig(source="tokens", tokens=(TokenSource(path=str(built)),), seq_len=32_768)
    stages = (LengthStage(from_step=0, seq_len=32_768, tokens_per_update=262_144),)
    steps = {
        "no step": lambda batches: None,
        "steps that only read": lambda batches: [(b.input_ids_BT[0].bincount(), b.labels_BT.max()) for b in batches],
        "steps of 20 ms": lambda batches: time.sleep(0.02),
    }
    for name, step in steps.items():
        loader = Loader(stages, data, open_data(data)[0], updates + 1)
        held = loader.update(0)
        alone = time_updates(updates, lambda update: step(held))
        waits = []

        def read_and_step(update: int) -> None:
            before = loader.waited
            batches = loader.update(update)
            waits.append(loader.waited - before)
            step(batches)

        seconds = time_updates(updates, read_and_step)
        loader.close()
        print(
            f"load, {name:<21} {updates * 262_144 / seconds / 1e6:6.1f} million tokens/s; an update {seconds / updates * 1e3:.2f} ms, "
            f"on tokens "
            f"in hand {alone / updates * 1e3:.2f} ms; waited {sum(waits) / seconds:.0%} of the time, longest {max(waits) * 1e3:.1f} ms",
            flush=True,
        )


def time_updates(updates: int, update: Callable[[int], None]) -> float:
    """Seconds that updates 1, 2, ... take."""
    began = time.monotonic()
    for number in range(1, updates + 1):
        update(number)
    return time.monotonic() - began


def pack_rows(documents: int) -> None:
    lengths = np.maximum(2, np.random.default_rng(0).lognormal(7, 1.5, documents).astype(np.int64))
    for seq_len in (8192, 131_072):
        for name in ("best_fit", "concatenate"):
            began = time.process_time()
            packed = best_fit(cut(lengths, seq_len), seq_len) if name == "best_fit" else concatenate(lengths, seq_len, 0, 0)
            seconds, rows = time.process_time() - began, int(packed.row_P[-1]) + 1
            print(
                f"pack {name:<12} {documents:,} documents into {rows:,} sequences of {seq_len:,}: {seconds:.2f} processor seconds, "
                f"{1 - lengths.sum() / rows / seq_len:.3%} padding",
                flush=True,
            )


if __name__ == "__main__":
    main()
