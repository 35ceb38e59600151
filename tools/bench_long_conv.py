"""Speed of long convolutions on this CPU: ours against torch.fft, interleaved; nothing is timed that is wrong.

    python tools/bench_long_conv.py                       # every case, about two minutes on two cores
    python tools/bench_long_conv.py --cases 16k-256 taps-128 --rounds 9
    python tools/bench_long_conv.py --clock cpu --threads 1   # on a machine with other work: time on the CPU, not on the wall
    python tools/bench_long_conv.py --bounds              # every bound of long_conv_bounds.py, PASS or FAIL, about five minutes

The contender is `irfft(rfft(u, n) * rfft(k, n), n)` under autograd, n the next length of small factors, on tensors that lie channel by
channel, as torch.fft likes them (ours takes [B, T, E] as layers have it). Each case is first compared with direct convolution in float64 on
a shorter sequence. Every round times all contenders once, in turn: forward and backward, seconds of the median round; "x faster" is the
median of the rounds' ratios. Extra memory: what a step adds at its peak to inputs, output and gradients, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads OpenMP: threads that wait do not spin

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from bench_attention import interleaved
from step_process import memory

from longtrain.ops.long_conv import explain, long_conv


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape; causal, B = 1."""

    about: str
    T: int
    E: int
    W: int | None = None
    """Taps; None: as many as tokens."""
    H: int | None = None
    """Filters; None: one a channel."""
    dtype: torch.dtype = torch.float32
    gated: bool = False
    documents: int = 1
    rounds: int | None = None
    """Fewer rounds for a long case."""

    @property
    def edges(self) -> Tensor:
        return torch.linspace(0, self.T, self.documents + 1).long()


CASES = {
    "16k-256": Case(about="T = 16,384, E = 256", T=16384, E=256),
    "64k-64": Case(about="T = 65,536, E = 64", T=65536, E=64),
    "64k-256": Case(about="T = 65,536, E = 256", T=65536, E=256, rounds=3),
    "16k-256-bf16": Case(about="the first in bf16, filter in float32", T=16384, E=256, dtype=torch.bfloat16),
    "16k-256-gated": Case(about="the first with both gates", T=16384, E=256, gated=True),
    "2k-768": Case(about="T = 2,048, E = 768", T=2048, E=768),
    "odd-255": Case(about="T = 20,001, E = 255", T=20001, E=255),
    "taps-8": Case(about="8 taps", T=16384, E=256, W=8),
    "taps-128": Case(about="128 taps", T=16384, E=256, W=128),
    "taps-1k": Case(about="1,024 taps", T=16384, E=256, W=1024),
    "heads": Case(about="8 filters for 256 channels", T=16384, E=256, H=8),
    "packed": Case(about="8 documents of 2,048", T=16384, E=256, documents=8),
}


def fast_length(needed: int) -> int:
    """The smallest even 2^a 3^b 5^c of at least `needed`."""
    return min(size << max(0, (-(-needed // size) - 1).bit_length()) for b in range(4) for c in range(4) for size in [2 * 3**b * 5**c])


def inputs(case: Case) -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(0)
    W = case.W or case.T

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    gates = (normal(1, case.T, case.E), normal(1, case.T, case.E)) if case.gated else (None, None)
    k = normal(case.H or case.E, W, dtype=torch.float32) / W**0.5
    return dict(u=normal(1, case.T, case.E), k=k, gate_in=gates[0], gate_out=gates[1], dy=normal(1, case.T, case.E))


def torch_fft(u_BET: Tensor, k_EW: Tensor, gate_in_BET: Tensor | None, gate_out_BET: Tensor | None, edges: Tensor) -> Tensor:
    """y [B, E, T]."""
    v = (u_BET if gate_in_BET is None else u_BET * gate_in_BET).float()
    parts = []
    for start, stop in zip(edges.tolist(), edges.tolist()[1:]):
        n = fast_length(stop - start + min(k_EW.shape[1], stop - start) - 1)
        k = k_EW[:, : stop - start]
        parts.append(torch.fft.irfft(torch.fft.rfft(v[..., start:stop], n=n) * torch.fft.rfft(k, n=n), n=n)[..., : stop - start])
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return (y if gate_out_BET is None else y * gate_out_BET).to(u_BET.dtype)


def step(case: Case, who: str) -> Callable[[], list[Tensor]]:
    """Forward and backward: gives out y and the gradients."""
    given = inputs(case)
    dy = given.pop("dy")
    if who == "torch":
        given = {name: x if x is None or name == "k" else x.transpose(1, 2).contiguous() for name, x in given.items()}
        dy = dy.transpose(1, 2).contiguous()
    leaves = {name: x.requires_grad_() for name, x in given.items() if x is not None}

    def ours() -> list[Tensor]:
        cu_seqlens = case.edges if case.documents > 1 else None
        y = long_conv(**leaves, cu_seqlens=cu_seqlens)
        return [y, *torch.autograd.grad(y, list(leaves.values()), dy)]

    def torchs() -> list[Tensor]:
        k_EW = leaves["k"].repeat_interleave(case.E // leaves["k"].shape[0], 0)
        y = torch_fft(leaves["u"], k_EW, leaves.get("gate_in"), leaves.get("gate_out"), case.edges)
        return [y, *torch.autograd.grad(y, list(leaves.values()), dy)]

    return torchs if who == "torch" else ours


def check(name: str, case: Case) -> None:
    """Exit unless outputs and gradients of ours equal direct convolution in float64 on at most 600 tokens, as near as torch.fft's."""
    T = min(case.T, 600)
    W, H = None if case.W is None else min(case.W, T), None if case.H is None else min(case.H, 2)
    small = replace(case, T=T, E=min(case.E, 16), W=W, H=H)
    given = inputs(small)
    dy = given.pop("dy").double()
    wide = {n: x.double().requires_grad_() for n, x in given.items() if x is not None}
    y = long_conv(**wide, cu_seqlens=small.edges, backend="reference")
    exact = [y, *torch.autograd.grad(y, list(wide.values()), dy)]
    tolerance = 1e-2 if case.dtype == torch.bfloat16 else 2e-6
    for who in ("ours", "torch"):
        for what, a, b in zip(("y", *(f"d{n}" for n in wide)), step(small, who)(), exact):
            a = a.transpose(1, 2) if who == "torch" and a.dim() == 3 else a
            error = float((a.detach().double() - b.detach()).norm() / b.detach().norm())
            if not error <= tolerance:
                sys.exit(f"bench_long_conv: {name}: {what} of {who} is off by {error:.1e} (at most {tolerance:.0e}): not timed")


def extra_bytes(name: str, who: str, threads: int) -> int:
    """Memory that a step of a case adds to inputs, output and gradients."""
    command = [sys.executable, __file__, "--measure-memory", name, who, str(threads)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)["extra"]


def measure_memory(case: Case, who: str, threads: int) -> dict:
    torch.set_num_threads(threads)
    step(replace(case, T=512), who)()  # loads the libraries
    whole, results = step(case, who), []
    found = memory(lambda: results.append(sum(x.nbytes for x in whole())), torch.device("cpu"))
    return {"extra": found["peak"] - results[0], "how": found["how"]}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds of the median round; `faster`: median over the rounds of the contender's time over ours."""

    ours: float
    torch: float
    faster: float


def measure(case: Case, rounds: int, clock) -> Measured:
    seconds = interleaved({who: step(case, who) for who in ("ours", "torch")}, min(rounds, case.rounds or rounds), clock)
    faster = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["torch"]))
    return Measured(ours=statistics.median(seconds["ours"]), torch=statistics.median(seconds["torch"]), faster=faster)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=7, help="rounds of a short case (long ones have fewer); default 7")
    parser.add_argument("--threads", type=int, help="torch threads; default torch's own")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of CPU over all threads")
    parser.add_argument("--bounds", action="store_true", help="check the bounds of long_conv_bounds.py instead; status 1 if one is missed")
    parser.add_argument("--small", action="store_true", help="tiny sizes that exercise the code; figures and verdicts mean nothing")
    parser.add_argument("--measure-memory", nargs=3, metavar=("CASE", "WHO", "THREADS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_memory:
        name, who, threads = arguments.measure_memory
        print(json.dumps(measure_memory(CASES[name], who, int(threads))))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    reasons = explain(torch.empty(1, 512, 4), torch.empty(4, 512))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.clock} clock, forward + backward")
    chosen = next(name for name, why in reasons.items() if why is None)
    print(f"long_conv: {chosen}", *(f"not {name}: {why}" for name, why in reasons.items() if why), sep="\n  ")
    if arguments.bounds:
        from long_conv_bounds import check_bounds

        sys.exit(check_bounds(arguments.rounds, clock, arguments.small))
    print(f"{'':14s}{'ours ms':>9s}{'torch ms':>10s}{'x faster':>10s}{'extra MiB':>11s}{'torch MiB':>11s}{'ratio':>8s}")
    for name in arguments.cases:
        case = CASES[name] if not arguments.small else replace(CASES[name], T=CASES[name].T // 16, rounds=1)
        check(name, case)
        m = measure(case, arguments.rounds, clock)
        ours, torchs = (0, 1) if arguments.small else (extra_bytes(name, who, torch.get_num_threads()) for who in ("ours", "torch"))
        print(f"{name:14s}{1e3 * m.ours:9.1f}{1e3 * m.torch:10.1f}{m.faster:10.2f}{ours / 2**20:11.1f}{torchs / 2**20:11.1f}"
              f"{ours / torchs:8.3f}   {case.about}", flush=True)


if __name__ == "__main__":
    main()
