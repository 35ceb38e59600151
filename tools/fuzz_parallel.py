"""Models, plans and layouts drawn at random: what P processes that share sequences compute is what one does, or all of them refuse it.

    python tools/fuzz_parallel.py --processes 3 --count 200
    python tools/fuzz_parallel.py --processes 3 --count 1 --seed 17     # one of them again

Models of longtrain.nn and tiny ones of transformers (not with --own), in float64 (`fuzz_parallel_cases.py`): loss and gradients are plain
autograd's, and have the same bits when done again. Refused is what one ValueError of longtrain's refuses, the same on all ranks. These are
started once, and anew behind a case that they did not survive together. Exit status 1 where a case was wrong or broke, with its command.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import sys
import tempfile
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from fuzz_parallel_cases import draw, run_case

COLLECTIVE_SECONDS, CASE_SECONDS = 60, 400


def outcome_of(work, *arguments) -> tuple[str, str]:
    """"exact", "refused", "wrong" or "broken", and the words that go with it."""
    try:
        wrong = work(*arguments)
        return "wrong" if wrong else "exact", wrong
    except Exception as error:  # judged with those of the other ranks
        innermost = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        clear = isinstance(error, ValueError) and innermost.is_relative_to(ROOT / "longtrain")
        return ("refused", str(error)) if clear else ("broken", traceback.format_exc())


def judged(outcomes: list[tuple[str, str]]) -> tuple[str, str]:
    """The outcome of all ranks together: refused is what all refuse in the same words, but for their numbers."""
    kinds, words = {kind for kind, _ in outcomes}, {re.sub(r"process \d+", "process", text) for _, text in outcomes}
    if kinds <= {"exact", "wrong"} or kinds == {"refused"} and len(words) == 1:
        return max(outcomes)  # wrong rather than exact
    return "broken", "\n".join(f"rank {rank}: {kind} {text}" for rank, (kind, text) in enumerate(outcomes))


def run_rank(rank: int, a: argparse.Namespace, first: int, directory: str, work) -> None:
    """One process. Rank 0 writes a line when a case begins and one when it ends; behind one that broke, all end."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    meeting, seconds = Path(directory) / f"ranks-{first}", timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=a.processes, timeout=seconds)
    judges = dist.new_group(timeout=4 * seconds)
    for seed in range(first, a.seed + a.count):
        faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
        if rank == 0:
            note(a, directory, seed, "begun", "")
        outcomes = [None] * a.processes
        dist.all_gather_object(outcomes, outcome_of(work, draw(seed, a.processes, a.own), directory), group=judges)
        kind, text = judged(outcomes)
        if rank == 0:
            note(a, directory, seed, kind, text)
        if kind == "broken":
            break
    os._exit(0)  # the interpreter's own end races with gloo's threads


def note(a: argparse.Namespace, directory: str, seed: int, kind: str, text: str) -> None:
    """Write a line, and say at once what went wrong."""
    with open(Path(directory) / "log", "a") as file:
        file.write(json.dumps((seed, kind, text)) + "\n")
    if kind in ("wrong", "broken"):
        again = f"python tools/fuzz_parallel.py --processes {a.processes} --seed {seed} --count 1{' --own' * a.own}"
        print(f"{kind}: {again}\n  {draw(seed, a.processes, a.own)}\n  {text}\n", flush=True)


def main(argv: list[str] | None = None, work=run_case) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others count on")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--own", action="store_true", help="models of longtrain.nn alone")
    a = parser.parse_args(argv)
    outcomes: dict[int, tuple[str, str]] = {}
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        while len(outcomes) < a.count:
            before = len(outcomes)
            try:
                mp.spawn(run_rank, (a, a.seed + before, directory, work), nprocs=a.processes)
                died = None
            except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
                died = error
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            if died and (not lines or lines[-1][1] != "begun"):
                raise died  # and no case is to blame
            if died:
                lines.append((lines[-1][0], "broken", str(died)))
                note(a, directory, *lines[-1])
            outcomes |= {seed: (kind, text) for seed, kind, text in lines}
    for text, times in Counter(re.sub(r"\d+", "N", text) for kind, text in outcomes.values() if kind == "refused").most_common():
        print(f"refused {times} times: {text}")
    kinds = Counter(kind for kind, _ in outcomes.values())
    said = ", ".join(f"{kinds[kind]} {kind}" for kind in ("exact", "refused", "wrong", "broken"))
    print(f"{a.count} cases on {a.processes} processes: {said}")
    return int(kinds["wrong"] + kinds["broken"] > 0)


if __name__ == "__main__":
    sys.exit(main())
