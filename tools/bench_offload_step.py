"""A streamed step with its stored tensors on disk against the same step with all of them in memory: peak memory and time.

    python tools/bench_offload.py step --path /scratch                            # 16 layers, 65,536 tokens: about an hour on two cores
    python tools/bench_offload.py step --path /scratch --seq-len 8192 --rounds 1

Layer 0 attends to everything, the others to 1,024 tokens. The baseline stores no attention outputs. Every variant has processes of its own.

Memory: MALLOC_MMAP_THRESHOLD_=65536, so that freed tensors go back to the system. The base is resident memory after imports, the model
and a small plain step, before `lt.apply`: staging, slabs and threads of the store count. Activations are the peak (VmHWM) of the first
step above that base, less the gradients. Time: processes without that setting, one step each in turn after a warm-up, medians over
rounds of the ratio within a round. No number is printed unless the loss and every gradient have the same bits in all variants (with K/V
in blocks: the same loss and norm but for rounding).
The table is also written as JSON to --out. Exit status 1 where no variant keeps both bounds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from bench_step import paired_ratio, say
from step_methods import on_disk
from step_process import machine, status_bytes

import longtrain as lt
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.train.peak_memory import read_peak, reset_peak
from longtrain.units import parse_bytes

BASELINE = "memory"
VARIANTS = {
    BASELINE: (0.0, False, 0),
    "disk": (0.0, True, 0),
    "disk, outputs stored": (1.0, True, 0),
    "disk, K/V in blocks": (1.0, True, 16),
}
"""Share of the attention outputs that is stored, whether everything that is stored goes to disk, and chunks in a block of layer 0's keys
and values, whose sums go there too."""

CPU = torch.device("cpu")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=".", help="a directory on the disk")
    parser.add_argument("--seq-len", type=int, default=65536)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=512, help="Plan.chunk_tokens")
    parser.add_argument("--staging", type=parse_bytes, default=parse_bytes("32MiB"), help="Offload.staging_bytes")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; 0 measures memory only")
    parser.add_argument("--time-only", action="store_true", help="skip the memory processes")
    parser.add_argument("--warmup-tokens", type=int, default=8192, help="length of the step before the timed ones")
    parser.add_argument("--memory-bound", type=float, default=0.2)
    parser.add_argument("--time-bound", type=float, default=1.05)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "benchmarks" / "bench_offload_step.json")
    a = parser.parse_args(argv)
    if BASELINE not in a.variants:
        parser.error(f"--variants: ratios are to {BASELINE!r}, which is missing")
    rows = measure(a)
    if wrong := [f"{v}: {r['loss']} {r['norm']}" for v, r in rows.items() if not same(v, r, rows[BASELINE])]:
        print(f"no numbers, since losses or gradients differ from {rows[BASELINE]['loss']} {rows[BASELINE]['norm']}:", *wrong, sep="\n  ")
        return 1
    print(table(rows, a))
    command = " ".join(["python", "tools/bench_offload.py", "step", *argv])
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps({"command": command, "machine": machine(), "rows": rows}, indent=1) + "\n")
    print(f"written to {a.out}")
    return int(not any(_within(rows, variant, a) for variant in a.variants if variant != BASELINE))


def measure(a: argparse.Namespace) -> dict[str, dict]:
    """Of each variant: what "memory" answers (see `serve`), and "times" in seconds, one a round."""
    rows: dict[str, dict] = {variant: {"times": []} for variant in a.variants}
    for variant in a.variants if not a.time_only else []:
        say(f"{variant}: memory")
        with ExitStack() as running:
            rows[variant] |= ask(start(a, variant, running, {"MALLOC_MMAP_THRESHOLD_": "65536"}), f"step {a.seq_len}")
    with ExitStack() as running:
        timed = {variant: start(a, variant, running, {}) for variant in (a.variants if a.rounds else [])}
        for variant, process in timed.items():
            say(f"{variant}: warm-up")
            ask(process, f"step {min(a.warmup_tokens, a.seq_len)}")
        for index in range(a.rounds):
            for variant in list(timed)[:: -1 if index % 2 else 1]:
                say(f"{variant}: round {index + 1} of {a.rounds}")
                answer = ask(timed[variant], f"step {a.seq_len}")
                rows[variant] = answer | rows[variant]
                rows[variant]["times"].append(answer["seconds"])
    say("")
    return rows


def same(variant: str, row: dict, base: dict) -> bool:
    """The same bits; with blocks, where sums are in another order, the same but for float32's rounding."""
    if VARIANTS[variant][2]:
        return all(abs(row[what] - base[what]) <= 1e-4 * abs(base[what]) for what in ("loss", "norm"))
    return (row["loss"], row["gradients"]) == (base["loss"], base["gradients"])


def table(rows: dict[str, dict], a: argparse.Namespace) -> str:
    base, width = rows[BASELINE], max(map(len, rows))
    lines = [f"T = {a.seq_len:,}, {a.layers} layers, chunks of {a.chunk}, staging {a.staging >> 20} MiB",
             f"{'':<{width}} {'peak MB':>9} {'activations MB':>15} {'x':>6} {'s':>8} {'x':>6} {'written GB':>11} {'waited s':>9}"]
    for variant, row in rows.items():
        line = f"{variant:<{width}}"
        line += f" {row['peak'] / 1e6:9.1f} {row['activations'] / 1e6:15.1f} {_memory(row, base):6.3f}" if not a.time_only else " " * 33
        line += f" {statistics.median(row['times']):8.2f} {paired_ratio(row, base):6.3f}" if a.rounds else " " * 16
        lines.append(line + f" {row['written'] / 1e9:11.2f} {row['waited']:9.2f}")
    return "\n".join(lines)


def _memory(row: dict, base: dict) -> float:
    return row["activations"] / base["activations"]


def _within(rows: dict[str, dict], variant: str, a: argparse.Namespace) -> bool:
    row, base = rows[variant], rows[BASELINE]
    return (a.time_only or _memory(row, base) <= a.memory_bound) and (not a.rounds or paired_ratio(row, base) <= a.time_bound)


def start(a: argparse.Namespace, variant: str, running: ExitStack, environment: dict[str, str]) -> subprocess.Popen:
    """A process that serves `variant`; it ends with `running`."""
    task = json.dumps({name: getattr(a, name) for name in ("path", "seq_len", "layers", "chunk", "staging")})
    process = subprocess.Popen(
        [sys.executable, __file__, task, variant],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    running.callback(process.wait)
    running.callback(process.stdin.close)
    return process


def ask(process: subprocess.Popen, request: str) -> dict:
    process.stdin.write(request + "\n")
    process.stdin.flush()
    if not (answer := process.stdout.readline()):
        raise RuntimeError(f"the process of {process.args[-1]!r} ended with status {process.wait()}; its message is above")
    return json.loads(answer)


def make_plan(model: LanguageModel, variant: str, *, path: str, seq_len: int, chunk: int, staging: int) -> lt.Plan:
    store_outputs, leaves, blocks = VARIANTS[variant]
    plan = lt.Plan(chunk_tokens=chunk, store_outputs=store_outputs, kv_block_tokens=chunk * blocks or None)
    return on_disk(model, plan, path, seq_len, staging) if leaves else plan


def serve(task: dict, variant: str) -> None:
    """Answers "step N" with memory, time and results of a step of N tokens."""
    torch.manual_seed(0)
    layers = task.pop("layers")
    model = LanguageModel(ModelConfig(
        vocab_size=256, num_layers=layers, hidden_size=256, intermediate_size=1024, num_heads=4, num_kv_heads=2,
        window=(None, *[1024] * (layers - 1))))  # fmt: skip
    ids_BT = torch.randint(256, (1, task["seq_len"]), generator=torch.Generator().manual_seed(1))

    def step(tokens: int) -> float:
        loss = model(ids_BT[:, :tokens], labels=ids_BT[:, :tokens]).loss
        loss.backward()
        return loss.item()

    plan = make_plan(model, variant, **task)
    step(min(64, task["seq_len"]))
    model.zero_grad()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    base = status_bytes("VmRSS")
    report = lt.apply(model, plan)
    store = report.store
    for request in sys.stdin:
        model.zero_grad()
        written = {**store.stats.written} if plan.offload else {}
        waited = sum(store.stats.seconds.values()) if plan.offload else 0
        reset_peak(CPU)
        begin = time.perf_counter()
        loss = step(int(request.split()[1]))
        seconds, peak = time.perf_counter() - begin, read_peak(CPU) - base
        print(json.dumps({
            "loss": loss, "gradients": digest(model), "seconds": seconds, "base": base, "peak": peak,
            "norm": float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()),
            "activations": peak - sum(p.grad.nbytes for p in model.parameters()),
            "written": sum(store.stats.written.values()) - sum(written.values()) if plan.offload else 0,
            "waited": sum(store.stats.seconds.values()) - waited if plan.offload else 0,
        }), flush=True)  # fmt: skip


def digest(model: LanguageModel) -> str:
    """Of the bits of every gradient."""
    total = hashlib.sha256()
    for parameter in model.parameters():
        total.update(parameter.grad.contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]), sys.argv[2])
