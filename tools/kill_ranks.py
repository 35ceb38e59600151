"""kill -9 a random rank of a run on several processes again and again, go on with as many or fewer, and compare with one process.

    python tools/kill_ranks.py                             # 20 kills over 120 updates, 2 ranks
    python tools/kill_ranks.py --ranks 4 --kills 5 --steps 40

After each kill all other ranks must exit within 30 seconds, with one error that names the dead rank, the step and what the others waited
for. The next start is on a random number of ranks (every fourth on one). In the end every update's loss and gradient norm, every validation
and the final weights must be those of one process that was left alone, losses within 1e-6 relative. Exit code 0 if all holds. The ranks
are forked from this process, which has imported everything and computed nothing.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  what a run imports is imported once, before the forks
from kill_resume import hold_checkpoints
from safetensors.torch import load_file

import longtrain.train.loop  # noqa: F401
from longtrain import cli
from longtrain.train.output import read_metrics

CONFIG = """\
model: {{vocab_size: 256, num_layers: 2, hidden_size: 48, intermediate_size: 96, num_heads: 4, num_kv_heads: 2, attention_dropout: 0.1}}
memory: {{chunk_tokens: 24, store_outputs: 0.5}}
parallel: {{cp_ulysses: null}}
data: {{source: text, files: [{texts}], seq_len: 64}}
train: {{steps: {steps}, tokens_per_update: 128, eps: 1e-3, device: cpu, kernel_fallback: warn, threads: 1, validate_every: 20,
validation_tokens: 128}}
checkpoint: {{every_steps: 3, keep: 2}}
metrics: {{peak_tflops: 1.0}}
output: {{dir: {out}}}
"""
LIMIT = 30.0
STEP = re.compile(r"^step +(\d+)/\d+  T ", re.MULTILINE)
DEAD = re.compile(
    r"^(.+): rank (\d+) \(process \d+ on \S+, last in .+\) gives no sign of life: dead or stuck; rank \d+ was at (.+); all", re.MULTILINE
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0, help="draws the moments, the ranks, and on how many the run goes on")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        return compare(args, Path(temporary))


def compare(args: argparse.Namespace, directory: Path) -> int:
    chance = random.Random(args.seed)
    texts = directory / "texts"
    texts.mkdir()
    for index in range(20):
        (texts / f"{index:02}.txt").write_text(
            " ".join(chance.choice(["span", "chunk", "carry", "tier"]) for _ in range(chance.randrange(20, 90)))
        )
    for name in ("alone", "killed"):
        (directory / f"{name}.yaml").write_text(CONFIG.format(texts=texts, steps=args.steps, out=directory / name))
    if problem := ended(start(1, directory, "alone", 0), [0]):
        print(f"FAILED: {problem}\n{(directory / 'alone.log').read_text()[-3000:]}")
        return 1
    began, slowest, problems = time.monotonic(), 0.0, []
    for kill in range(1, args.kills + 1):
        ranks = args.ranks if kill % 4 else max(2, chance.randrange(1, args.ranks + 1))
        seconds, problem = kill_once(directory, args, chance, kill, ranks)
        slowest = max(slowest, seconds)
        problems += [problem] if problem else []
        if kill % 4 == 0 and not problem:  # a few updates on one process in between
            one_for_a_while(directory, kill)
    last = 1 + args.kills % args.ranks
    problems += [p] if (p := ended(start(last, directory, "killed", args.kills + 1), [0] * last)) else []
    problems += differences(directory / "alone", directory / "killed")
    print(
        f"{args.kills} kills of one of {args.ranks} ranks; the others ended within {slowest:.1f} s; {time.monotonic() - began:.0f} s in all"
    )
    for problem in problems:
        print(f"FAILED: {problem}")
    if not problems:
        print(f"as one process that was left alone: {args.steps} updates, validations, weights; losses within 1e-6")
    return 1 if problems else 0


def kill_once(directory: Path, args: argparse.Namespace, chance: random.Random, kill: int, ranks: int) -> tuple[float, str]:
    """Start the run on `ranks` and kill one of them, a fifth of the times while it starts, once it has met the others (before that they
    wait
    minutes for it: it may be late). Seconds until all had ended, and what was wrong."""
    log = directory / "killed.log"
    log.touch()
    begun, starting, victim = len(log.read_text()), kill % 5 == 3, chance.randrange(ranks)
    processes = start(ranks, directory, "killed", kill, hold=args.steps - 1)  # it does not end before it is killed
    target = min(args.steps - 6, round((kill + chance.uniform(-0.5, 0.5)) * args.steps / (args.kills + 1)))

    def done() -> int:
        steps = STEP.findall(log.read_text()[begun:])
        return int(steps[-1]) if steps else 0

    deadline = time.monotonic() + 120
    there = lambda: has_met(directory, kill, ranks, victim) if starting else done() >= max(target, 1)
    while not there() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 1.0 if starting else 0.1))
    reached = done()
    os.kill(processes[victim], signal.SIGKILL)
    killed = time.monotonic()
    os.waitpid(processes.pop(victim), 0)
    wrong = ended(processes, [1] * len(processes), LIMIT)
    seconds = time.monotonic() - killed
    said = log.read_text()[begun:]
    found = DEAD.findall(said)
    if not wrong and [int(rank) for _, rank, _ in found] != [victim] and not (starting and "did not meet" in said):
        wrong = f"the error does not name rank {victim}: {said[-1500:]}"
    where = f"{found[0][0]}, the others at {found[0][2]}" if found else said.strip()[-100:]
    print(f"kill {kill:2}: rank {victim} of {ranks} after step {reached:3}: {seconds:4.1f} s, {where}", flush=True)
    return seconds, f"kill {kill}: {wrong}" if wrong else ""


def one_for_a_while(directory: Path, kill: int) -> None:
    """The run goes on with one process, which is asked to end."""
    log = directory / "killed.log"
    begun = len(log.read_text())
    (process,) = start(1, directory, "killed", kill)
    while not STEP.search(log.read_text()[begun:]):
        if os.waitpid(process, os.WNOHANG)[0]:
            return
        time.sleep(0.005)
    os.kill(process, signal.SIGTERM)
    os.waitpid(process, 0)


def start(ranks: int, directory: Path, name: str, number: int, hold: int | None = None) -> list[int]:
    """Fork `ranks` of a `longtrain train`, which finish no checkpoint beyond update `hold`; their process ids."""
    meet, processes = meeting(directory, name, number, ranks), []
    for rank in range(ranks):
        if (process := os.fork()) == 0:
            code = 1
            try:
                if hold is not None:
                    hold_checkpoints(hold)
                descriptor = os.open(directory / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                if ranks > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LONGTRAIN_MEET": f"file://{meet}"}
                code = cli.main(["train", str(directory / f"{name}.yaml")])
                sys.stdout.flush()
            finally:
                os._exit(code)
        processes.append(process)
    return processes


def meeting(directory: Path, name: str, number: int, ranks: int) -> Path:
    return directory / f"meet-{name}-{number}-{ranks}"


def has_met(directory: Path, kill: int, ranks: int, rank: int) -> bool:
    """Whether a rank has given a sign of life in the file by which they meet."""
    meet = meeting(directory, "killed", kill, ranks)
    return meet.exists() and f"longtrain/rank {rank}".encode() in meet.read_bytes()


def ended(processes: list[int], codes: list[int], seconds: float = 600) -> str:
    """Wait for processes; "" where they ended with these exit codes in time. What still runs then is killed."""
    deadline, found = time.monotonic() + seconds, {}
    while len(found) < len(processes) and time.monotonic() < deadline:
        for process in (p for p in processes if p not in found):
            over, status = os.waitpid(process, os.WNOHANG)
            if over:
                found[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    late = [p for p in processes if p not in found]
    for process in late:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    if late:
        return f"{len(late)} of {len(processes)} still ran after {seconds:.0f} s"
    got = [found[p] for p in processes]
    return "" if got == codes else f"exit codes {got}, expected {codes}"


def differences(alone: Path, killed: Path) -> list[str]:
    found = []
    for kind, names, bound in (("step", ("loss", "grad_norm"), 1e-6), ("validation", ("loss",), 1e-6)):
        a, b = ([r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == kind] for run in (alone, killed))
        if [r["step"] for r in a] != [r["step"] for r in b]:
            found.append(f"{kind} records are of other steps: {[r['step'] for r in b]}")
        worst = max((abs(x[n] - y[n]) / abs(x[n]), n, x["step"]) for x, y in zip(a, b, strict=False) for n in names)
        if worst[0] > bound * (10 if worst[1] == "grad_norm" else 1):
            found.append(f"{kind} {worst[2]}: {worst[1]} differs by {worst[0]:.1e}")
    ours, theirs = (load_file(run / "model.safetensors") for run in (killed, alone))
    worst, name = max((float((ours[n] - t).norm() / t.norm()), n) for n, t in theirs.items())
    return found + ([f"the final {name} differs by {worst:.1e}"] if worst > 1e-4 else [])


if __name__ == "__main__":
    sys.exit(main())
