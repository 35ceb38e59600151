"""What long convolution on two CPU cores must show: speed, memory, accuracy, against bounds. `bench_long_conv.py --bounds` runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from attention_bounds import Bound, at_least
from bench_long_conv import CASES, Case, check, extra_bytes, inputs, measure, step
from step_process import memory

from longtrain.ops.long_conv import long_conv

LONG = 2**20


def check_bounds(rounds: int, clock, small: bool) -> int:
    """Print every bound; 1 if one is missed. `small`: sizes a sixteenth."""
    missed = 0
    for section in (speed_bounds, memory_bounds, long_bounds, error_bounds):
        for bound in section(rounds, clock, small):
            missed += not bound.held
            print(f"{'PASS' if bound.held else 'FAIL'}  {bound.name:<66} {bound.measured:<28} {bound.wanted}", flush=True)
    print(f"{missed} missed" if missed else "all held")
    return 1 if missed and not small else 0


def speed_bounds(rounds: int, clock, small: bool) -> Iterator[Bound]:
    """Forward and backward against torch.fft, on one thread and on two."""
    before = torch.get_num_threads()
    for name, least in (("16k-256", 3.5), ("64k-64", 2.8), ("64k-256", 2.8)):
        case = replace(CASES[name], T=CASES[name].T // 16, rounds=1) if small else CASES[name]
        check(name, case)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = measure(case, rounds, clock)
            yield at_least(f"{case.about}, {threads} thread{'s' * (threads > 1)}, against torch.fft", found.faster, least)
    torch.set_num_threads(before)


def memory_bounds(rounds: int, clock, small: bool) -> Iterator[Bound]:
    """Beside inputs, output and gradients, of a forward and a backward."""
    if small:
        return
    for name in ("16k-256", "64k-64", "64k-256"):
        for threads in (1, 2):
            ours, torchs = (extra_bytes(name, who, threads) for who in ("ours", "torch"))
            yield Bound(name=f"{CASES[name].about}, {threads} thread{'s' * (threads > 1)}: extra memory", wanted="<= 0.30x",
                        measured=f"{ours / 2**20:.1f} MiB, {ours / torchs:.3f}x torch's", held=ours <= 0.3 * torchs)


def long_bounds(rounds: int, clock, small: bool) -> Iterator[Bound]:
    """A million tokens, by groups of channels, beside inputs, output and gradients."""
    command = [sys.executable, __file__, str(LONG // 64 if small else LONG)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    yield Bound(name=f"T = {found['tokens']:,}, E = 64, forward + backward: extra memory", measured=f"{found['extra'] / 2**20:.1f} MiB",
                wanted="<= 192 MiB", held=found["extra"] <= 192 * 2**20)


def long_extra(tokens: int) -> dict:
    torch.set_num_threads(2)
    step(Case(about="", T=512, E=64), "ours")()
    whole, results = step(Case(about="", T=tokens, E=64), "ours"), []
    found = memory(lambda: results.append(sum(x.nbytes for x in whole())), torch.device("cpu"))
    return {"tokens": tokens, "extra": found["peak"] - results[0]}


def error_bounds(rounds: int, clock, small: bool) -> Iterator[Bound]:
    """Errors against float64, of ours over torch.fft's in the same dtype."""
    for name in ("16k-256", "16k-256-bf16"):
        case = replace(CASES[name], E=8, T=1024 if small else 16384)
        given = inputs(case)
        leaves = [given["u"].double().requires_grad_(), given["k"].double().requires_grad_()]
        y = long_conv(*leaves, backend="fft")  # in float64: 1e-15, which tests compare with direct convolution
        exact = [y, *torch.autograd.grad(y, leaves, given["dy"].double())]
        found = {who: [x.transpose(1, 2) if who == "torch" and x.dim() == 3 else x for x in step(case, who)()] for who in ("ours", "torch")}
        for what, a, b, x in zip(("y", "du", "dk"), found["ours"], found["torch"], exact):
            mine, torchs = (float((z.detach().double() - x.detach()).norm() / x.detach().norm()) for z in (a, b))
            yield Bound(name=f"error of {what} at {case.T:,}, {str(case.dtype)[6:]}", wanted="<= 2.00x", held=mine <= 2 * torchs,
                        measured=f"{mine:.1e}, {mine / torchs:.2f}x torch.fft's")


if __name__ == "__main__":
    print(json.dumps(long_extra(int(sys.argv[1]))))
