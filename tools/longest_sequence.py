"""The longest sequence whose training step fits a memory budget, by measurement, for each way of running the step.

    python tools/longest_sequence.py --path /scratch                        # L8 E256 F1024 V8192 in 768 MiB; hours on two cores
    python tools/longest_sequence.py --budget 200MiB --layers 2 --methods checkpoint+chunked streamed
    python tools/longest_sequence.py --shape llama3-8b --budget 72GiB       # on a GPU, random weights
    python tools/longest_sequence.py --methods checkpoint --rounds 0        # one method, and later the others: what was run already counts

Memory is all that the step holds at its peak, parameters and gradients included: on a CPU resident memory (VmHWM) above the interpreter
and its libraries, with MALLOC_MMAP_THRESHOLD_=65536; on CUDA torch.cuda.max_memory_allocated. Two short steps give a straight line, the
line a length; that length is run, the line drawn again through what was measured, until a length that fits and one that does not lie
within --resolution of each other. Only lengths that were run count. Every run is a process of its own, so one may die of too little memory.

Then the methods' times, interleaved, at the longest length of --time-at, with medians over --rounds. Everything is written to --out as
JSON after every run, and as Markdown and a plot (PNG, where matplotlib is installed) at the end. Started again with the same shape and
budget it goes on with what the JSON holds (--redo: from the beginning), and shows other methods that are there beside those it is given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from bench_step import SHAPE, paired_ratio, say
from step_methods import METHODS
from step_process import StepProcess, Task, machine

from longtrain.units import format_bytes, parse_bytes

SHAPES = {
    "small": SHAPE | {"layers": 8, "dtype": "float32"},
    "llama3-8b": {"layers": 32, "hidden": 4096, "ffn": 14336, "vocab": 128256, "heads": 32, "kv-heads": 8, "dtype": "bfloat16"},
}
DEFAULT = ["checkpoint", "checkpoint+chunked", "selective+chunked", "streamed", "streamed+disk"]


def main(argv: list[str] | None = None) -> int:
    a = arguments(argv)
    a.out.mkdir(parents=True, exist_ok=True)
    found, times, commands = known(a)
    command = " ".join(["python", "tools/longest_sequence.py", *(sys.argv[1:] if argv is None else argv)])
    commands = [*(c for c in commands if c != command), command]

    def write() -> None:
        result = {"commands": commands, "machine": machine(), **same(a), "methods": found, "times": times}
        (a.out / "longest_sequence.json").write_text(json.dumps(result, indent=1) + "\n")

    for method in a.methods:
        runs = found.setdefault(method, {"longest": 0, "runs": {}})["runs"]
        found[method] = longest(method, a, runs=runs, ran=write)
    found = {method: found[method] for method in sorted(found, key=METHODS.index)}
    if a.rounds and a.time_at in a.methods and found[a.time_at]["longest"]:
        times = time_at(a, found[a.time_at]["longest"])
    write()
    text = table(found, times, a)
    print(text)
    (a.out / "longest_sequence.md").write_text("\n".join(f"`{c}`\\" for c in commands) + f"\n\n{text}\n")
    plot(found, a)
    return 0


def same(a: argparse.Namespace) -> dict:
    """What runs must have in common to count together."""
    return {
        name: getattr(a, name) for name in ("budget", "chunk", "plan", "device", "window", *(n.replace("-", "_") for n in SHAPES["small"]))
    }


def known(a: argparse.Namespace) -> tuple[dict[str, dict], dict[str, dict], list[str]]:
    """Methods with their runs, times and the commands of earlier calls, as far as --out has them of this shape and budget."""
    file = a.out / "longest_sequence.json"
    before = json.loads(file.read_text()) if file.exists() and not a.redo else {}
    if {key: before.get(key) for key in same(a)} != same(a):
        return {}, {}, []
    found = {m: {"longest": row["longest"], "runs": {int(t): b for t, b in row["runs"].items()}} for m, row in before["methods"].items()}
    return found, before["times"], before["commands"]


def task_of(a: argparse.Namespace, tokens: int) -> Task:
    return Task(
        layers=a.layers, hidden=a.hidden, ffn=a.ffn, vocab=a.vocab, heads=a.heads, kv_heads=a.kv_heads, head_dim=None, window=a.window,
        tie_embeddings=False, tokens=tokens, batch=1, dtype=a.dtype, device=a.device, chunk=a.chunk, plan=a.plan,
        warmup_tokens=min(tokens, 2 * a.chunk), disk=a.path)  # fmt: skip


def longest(
    method: str,
    a: argparse.Namespace,
    measure: Callable[[str, Task], int | None] | None = None,
    *,
    runs: dict[int, int | None] | None = None,
    ran: Callable[[], object] = lambda: None,
) -> dict:
    """{"longest": tokens, 0 where none fits, "runs": {tokens: bytes at the peak, None where the process died}}. `measure`: `peak`. `runs`:
    those there are already; `ran` is called after each further one."""
    measure, runs = measure or peak, {} if runs is None else runs

    def run(tokens: int) -> tuple[int, int]:
        """The longest length that fits and the shortest that does not, 0 where none is known."""
        if tokens not in runs:
            say(f"{method}: T = {tokens:,}")
            runs[tokens] = measure(method, task_of(a, tokens))
            ran()
            print(
                f"{method}: T = {tokens:,}: {'died' if runs[tokens] is None else format_bytes(runs[tokens])}", file=sys.stderr, flush=True
            )
        fitting = [t for t, m in runs.items() if m is not None and m <= a.budget]
        return max(fitting, default=0), min((t for t in runs if t not in fitting), default=0)

    for tokens in (4 * a.chunk, 8 * a.chunk):
        low, high = run(tokens)
    while low < a.longest if not high else high - low > max(a.resolution * high, a.chunk):
        step = max(int(a.resolution * low) // a.chunk, 1) * a.chunk
        wanted = max((on_the_line(runs, a.budget) or 2 * low) // a.chunk * a.chunk, low + step)  # what the line allows may fit: look beyond
        wanted = min(wanted, a.longest)
        if high:
            wanted = min(wanted, high - min(step, (high - low) // a.chunk // 2 * a.chunk))
        low, high = run(wanted)
    return {"longest": low, "runs": {t: runs[t] for t in sorted(runs)}}


def on_the_line(runs: dict[int, int | None], budget: int) -> int:
    """Tokens that the line through the two longest measured steps gives the budget; 0 where it does not rise."""
    measured = sorted((t, m) for t, m in runs.items() if m is not None)
    if len(measured) < 2:
        return 0
    (t0, m0), (t1, m1) = measured[-2:]
    return int(t1 + (budget - m1) * (t1 - t0) / (m1 - m0)) if m1 > m0 else 0


def peak(method: str, task: Task) -> int | None:
    """Bytes that a step holds at its peak; None where its process ends for lack of memory."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        StepProcess(task, method, {"MALLOC_MMAP_THRESHOLD_": "65536"}, Path(scratch) / "g") as process,
    ):
        try:
            process.ask("warm-up")
            return process.ask("memory")["whole"]
        except RuntimeError:
            return None


def time_at(a: argparse.Namespace, tokens: int) -> dict[str, dict]:
    """Of every method that can: seconds of each round at `tokens`."""
    rows = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        processes = {m: running.enter_context(StepProcess(task_of(a, tokens), m, {}, Path(scratch) / "g")) for m in a.methods}
        for process in processes.values():
            process.ask("warm-up")
        for index in range(a.rounds):
            for method, process in processes.items():
                say(f"{method}: time {index + 1} of {a.rounds} at T = {tokens:,}")
                rows.setdefault(method, {"tokens": tokens, "times": []})["times"].append(process.ask("time")["wall"])
    say("")
    return rows


def table(found: dict[str, dict], times: dict[str, dict], a: argparse.Namespace) -> str:
    at = next(iter(times.values()))["tokens"] if times else 0
    against = [name for name in list(found)[:2] if found[name]["longest"]]
    timed = f" s at T = {at:,} | x {a.time_at} |" if times else ""
    lines = [f"Budget {format_bytes(a.budget)}, L{a.layers} E{a.hidden} F{a.ffn} V{a.vocab}, {a.dtype}, chunks of {a.chunk}.", "",
             "| method | longest T | " + "".join(f"x {name} | " for name in against) + "peak there |" + timed,
             "|" + "---|" * (3 + len(against) + 2 * bool(times))]  # fmt: skip
    for method, row in found.items():
        tokens = row["longest"]
        least = "at least " * bool(tokens and all(t <= tokens for t in row["runs"]))  # nothing longer was tried
        ratios = "".join(f"{tokens / found[name]['longest']:.1f} | " for name in against)
        line = f"| {method} | {least}{tokens:,} | {ratios}{format_bytes(row['runs'][tokens]) if tokens else '-'} |"
        if method in times:
            line += f" {statistics.median(times[method]['times']):.2f} | {paired_ratio(times[method], times[a.time_at]):.3f} |"
        lines.append(line)
    return "\n".join(lines)


def plot(found: dict[str, dict], a: argparse.Namespace) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install longtrain[plot]", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for method, row in found.items():
        points = [(t, m) for t, m in row["runs"].items() if m is not None]
        axes.plot([t for t, _ in points], [m / 2**30 for _, m in points], marker="o", label=f"{method}: {row['longest']:,}")
    axes.axhline(a.budget / 2**30, color="black", linestyle="--", linewidth=1)
    axes.set(xscale="log", xlabel="tokens", ylabel="GiB at the peak of a step", title=f"Longest sequence in {format_bytes(a.budget)}")
    axes.legend(frameon=False)
    figure.savefig(a.out / "longest_sequence.png", dpi=130)
    pyplot.close(figure)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="768MiB")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="the sizes below, where they are not given")
    for name in SHAPES["small"]:
        parser.add_argument(f"--{name}", type=str if name == "dtype" else int)
    parser.add_argument("--window", nargs="*", help="pattern over the layers, tokens or 'full'")
    parser.add_argument("--chunk", type=int, default=512, help="Plan.chunk_tokens; lengths are multiples of it")
    parser.add_argument("--plan", default="", help="more Plan fields of the streamed steps: key=value,...")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=DEFAULT)
    parser.add_argument("--path", default=".", help="a directory on the disk, for streamed+disk")
    parser.add_argument("--resolution", type=float, default=0.02, help="stop when the answer is known to this share of it")
    parser.add_argument("--longest", type=int, default=1 << 22, help="look no further than this")
    parser.add_argument("--time-at", choices=METHODS, default="checkpoint+chunked", help="time all at this method's longest length")
    parser.add_argument("--redo", action="store_true", help="forget what --out holds")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; 0: no times")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "benchmarks", help="a directory")
    a = parser.parse_args(argv)
    a.longest -= a.longest % a.chunk
    for name, value in SHAPES[a.shape].items():
        if getattr(a, name.replace("-", "_")) is None:
            setattr(a, name.replace("-", "_"), value)
    try:
        a.budget = parse_bytes(a.budget, "--budget")
    except ValueError as error:
        parser.error(str(error))
    return a


if __name__ == "__main__":
    sys.exit(main())
