"""Memory and time of one training step (forward and backward), streamed against plain torch, for any shape.

    python tools/bench_step.py --seq-len 8192 --chunk 1024
    python tools/bench_step.py --seq-len 8192 --methods checkpoint+chunked streamed streamed:store_outputs=0 --repeats 5

Methods: see step_methods.py. Every method has processes of its own.

Memory, CPU: MALLOC_MMAP_THRESHOLD_=65536 for all, so that freed tensors go back to the system; after a warm-up step, the peak of
resident memory (VmHWM) during a step above the base, which is printed beside: interpreter, libraries and parameters, without
gradients. CUDA: torch.cuda.max_memory_allocated in the same way.
Time: separate processes without that setting, one step each in turn, `--repeats` rounds after a warm-up step each; medians.

No number is printed unless every method's loss and every parameter's gradient agree with the first method's, at this length.
The table is also written as JSON to --out (benchmarks/bench_step.json).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from step_methods import METHODS
from step_process import StepProcess, Task, machine

TOLERANCE = {"float64": 1e-9, "float32": 2e-4, "bfloat16": 6e-2}
"""Largest relative difference of a parameter's gradient: rounding grows with length, a wrong gradient is of order one."""

SHAPE = {"layers": 4, "hidden": 256, "ffn": 1024, "vocab": 8192, "heads": 4, "kv-heads": 2}


def main(argv: list[str] | None = None) -> int:
    a = arguments(argv)
    rows, plans = [], vars(a)
    for tokens in a.seq_len:
        task = Task.from_arguments(plans, tokens)
        measured = measure(task, a)
        if measured is None:
            return 1
        print(table(measured, a.against, tokens), flush=True)
        rows += measured
    if len(a.seq_len) > 1:
        print(slopes(rows, a.against))
    result = {
        "command": " ".join(["python", "tools/bench_step.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine(),
        "shape": {k: v for k, v in plans.items() if k not in ("out", "methods", "seq_len")},
        "rows": rows,
    }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"written to {a.out}")
    if a.against_transformers:
        return transformers_verdict(rows)
    return 0


def measure(task: Task, a: argparse.Namespace) -> list[dict] | None:
    """Rows of one length, or None where methods disagree (which is printed)."""
    rows = {method: {"method": method, "tokens": task.tokens, "times": []} for method in a.methods}
    outcomes: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix="longtrain-bench-") as scratch, ExitStack() as running:
        gradients = {method: Path(scratch) / f"{index}.pt" for index, method in enumerate(a.methods)}
        for method in a.methods if not a.time_only else []:
            say(f"T={task.tokens:,} {method}: memory")
            with StepProcess(task, method, {"MALLOC_MMAP_THRESHOLD_": "65536"}, gradients[method]) as process:
                outcomes[method] = process.ask("warm-up with gradients")
                rows[method] |= process.ask("memory")
        timed = {}
        for method in a.methods if a.repeats else []:
            say(f"T={task.tokens:,} {method}: warm-up")
            timed[method] = running.enter_context(StepProcess(task, method, {}, gradients[method]))
            if method in outcomes:
                timed[method].ask("warm-up")
            else:
                outcomes[method] = timed[method].ask("warm-up with gradients")
        if wrong := disagreements(outcomes, a.dtype):
            print("no numbers, since results differ:", *wrong, sep="\n  ")
            return None
        for repeat in range(a.repeats):
            for method, process in timed.items():
                say(f"T={task.tokens:,} {method}: time {repeat + 1} of {a.repeats}")
                rows[method]["times"].append(process.ask("time")[a.clock])
    say("")
    for method, row in rows.items():
        row["loss"] = outcomes[method]["loss"]
        row["seconds"] = statistics.median(row["times"]) if row["times"] else None
    return list(rows.values())


def disagreements(outcomes: dict[str, dict], dtype: str) -> list[str]:
    """Where losses and gradients are not those of the first method, to the dtype's tolerance."""
    say("comparing gradients")
    found = []
    (first, reference), *others = [
        (method, {"loss": torch.tensor(o["loss"]), **torch.load(o["gradients"])}) for method, o in outcomes.items()
    ]
    for method, ours in others:
        if ours.keys() != reference.keys():
            found.append(f"{method}: other parameters than {first}: {sorted(ours.keys() ^ reference.keys())[:4]}")
            continue
        for name, exact in reference.items():
            error = ((ours[name].double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300)).item()
            if not error <= TOLERANCE[dtype]:
                found.append(f"{method}: {name} differs from {first}'s by {error:.1e}, allowed {TOLERANCE[dtype]:.0e}")
    return found


def table(rows: list[dict], against: list[str], tokens: int) -> str:
    """Peak and time of each method, and their ratios to those of the methods in `against`."""
    by_method = {row["method"]: row for row in rows}
    others = [m for m in against if m in by_method]
    width = max(len(r["method"]) for r in rows)
    lines = [
        f"\nT = {tokens:,}",
        f"{'method':<{width}} {'base MB':>9} {'peak MB':>9} {'s':>9}" + "".join(f"   x {m} (mem, time)" for m in others),
    ]
    for row in rows:
        peak, seconds = row.get("peak"), row["seconds"]
        line = f"{row['method']:<{width}} {_mb(row.get('base'))} {_mb(peak)} {'-' if seconds is None else f'{seconds:.2f}':>9}"
        for m in others:
            other = by_method[m].get("peak")  # 0 where a tiny step never rose above its base
            memory = f"{peak / other:.3f}" if peak and other else "-"
            ratio = f"{paired_ratio(row, by_method[m]):.3f}" if seconds else "-"
            line += f"   {memory + ', ' + ratio:>{len(m) + 14}}"
        lines.append(line)
    return "\n".join(lines)


def paired_ratio(row: dict, other: dict) -> float:
    """Median over rounds of the ratio of two methods' times in the same round."""
    return statistics.median(x / y for x, y in zip(row["times"], other["times"], strict=True))


def slopes(rows: list[dict], against: list[str]) -> str:
    """Bytes a token between consecutive lengths."""
    lines = ["\nbytes a token"]
    for method in dict.fromkeys(r["method"] for r in rows):
        own = [r for r in rows if r["method"] == method and r.get("peak")]
        for short, long in zip(own, own[1:]):
            slope = (long["peak"] - short["peak"]) / (long["tokens"] - short["tokens"])
            lines.append(f"{method}: {slope:,.0f} between {short['tokens']:,} and {long['tokens']:,}")
    return "\n".join(lines)


def transformers_verdict(rows: list[dict]) -> int:
    """Whether our baselines are within 10% of transformers' own model, in memory and time; 1 if not."""
    status = 0
    for ours, theirs in (("plain", "hf-plain"), ("checkpoint", "hf-checkpoint")):
        for row in (r for r in rows if r["method"] == ours):
            other = next((r for r in rows if r["method"] == theirs and r["tokens"] == row["tokens"]), None)
            if other is None:
                continue
            memory, seconds = row["peak"] / other["peak"], paired_ratio(row, other) if row["times"] else float("nan")
            # Handicapped is what would flatter us; being leaner than transformers makes a stronger rival.
            fair = memory <= 1.1 and not seconds > 1.1
            status |= not fair
            print(f"{ours} against transformers at T={row['tokens']:,}: memory {memory:.3f}x, time {seconds:.3f}x: "
                  f"{'a fair baseline' if fair else 'HANDICAPPED by more than 10%'}")
    return int(status)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--head-dim", type=int, help="hidden / heads by default")
    parser.add_argument("--window", nargs="*", default=None, help="pattern over the layers, tokens or 'full'")
    parser.add_argument("--tie-embeddings", action="store_true")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[8192], help="one or more lengths T; with several, slopes are printed")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chunk", type=int, default=1024, help="Plan.chunk_tokens of the streamed step")
    parser.add_argument("--plan", default="", help="more Plan fields of the streamed step: key=value,...")
    parser.add_argument("--disk", default=".", help="a directory on the disk that streamed+disk writes to")
    parser.add_argument("--methods", nargs="+", default=["checkpoint", "checkpoint+chunked", "selective+chunked", "streamed"],
                        help=f"of {', '.join(METHODS)}, streamed:key=value,...")
    parser.add_argument("--against", nargs="*", default=["checkpoint", "checkpoint+chunked", "selective+chunked"],
                        help="methods the ratios are taken to")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds; 0 measures memory only")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor seconds of the process, for a machine that does "
        "other work too; with OMP_NUM_THREADS=1, since waiting threads would count",
    )
    parser.add_argument("--time-only", action="store_true", help="skip the memory processes")
    parser.add_argument(
        "--warmup-tokens",
        type=int,
        help="length of the warm-up step of the timed processes; T by default, less makes long "
        "lengths cheaper (never where it gives the gradients that are compared)",
    )
    parser.add_argument(
        "--against-transformers", action="store_true", help="add hf-plain and hf-checkpoint and judge our baselines by them"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "benchmarks" / "bench_step.json")
    a = parser.parse_args(argv)
    if a.against_transformers:
        a.methods = list(
            dict.fromkeys([m for m in ("plain", "checkpoint") if m not in a.methods] + a.methods + ["hf-plain", "hf-checkpoint"])
        )
    if a.time_only and not a.repeats:
        parser.error("--time-only with --repeats 0 measures nothing")
    for method in a.methods:
        if method.partition(":")[0] not in METHODS:
            parser.error(f"--methods: {method!r} is none of {', '.join(METHODS)}")
    return a


def _mb(size: int | None) -> str:
    return f"{'-' if size is None else f'{size / 1e6:.1f}':>9}"


def say(text: str) -> None:
    """One line that replaces itself on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text and os.environ.get("BENCH_VERBOSE"):
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
