"""Speed of attention on this CPU: ours, torch's SDPA and a plain matmul, interleaved; nothing is timed that is wrong.

    python tools/bench_attention.py                       # every case but `window`, about two minutes on two cores
    python tools/bench_attention.py --cases fp32-8k chunk --rounds 9
    python tools/bench_attention.py --clock cpu           # on a machine with other work: time on the CPU, not on the wall
    python tools/bench_attention.py --bounds              # every bound of attention_bounds.py, PASS or FAIL, about six minutes

Each case is first compared with the float64 reference on a shorter sequence. GFLOP/s count the visible (query, key)
pairs only: 4 D a pair and head forward, 10 D backward. Every round times all contenders once, in turn; rates are of the
median round, ratios the median of the rounds' ratios (above 1: ours is faster).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads OpenMP: threads that wait do not spin

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from longtrain.ops.attention import attention, explain

MATMUL = 1536


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape. B = 1, causal."""

    about: str
    T: int
    S: int | None = None
    """Keys, if more than queries: a chunk at an offset."""
    H: int = 8
    K: int = 8
    D: int = 64
    dtype: torch.dtype = torch.float32
    options: dict = field(default_factory=dict)
    against: str = "sdpa"
    """The contender: "sdpa", or the name of another case (the same op, other shape)."""
    rounds: int | None = None
    """Fewer rounds for a long case."""

    @property
    def keys(self) -> int:
        return self.S or self.T

    def pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        if "cu_seqlens_q" in self.options:
            lengths = self.options["cu_seqlens_q"].diff().tolist()
            return sum(n * (n + 1) // 2 for n in lengths)
        window = self.options.get("window_size", (self.keys, 0))[0] + 1
        return sum(min(window, self.keys - self.T + i + 1) for i in range(self.T))


DOCUMENTS = torch.tensor([0, 512, 1024, 3072, 8192])
CASES = {
    "fp32-2k": Case(about="B1 H8 D64", T=2048),
    "fp32-8k": Case(about="B1 H8 D64", T=8192, rounds=3),
    "bf16-4k": Case(about="B1 H8 D64", T=4096, dtype=torch.bfloat16),
    "d128-2k": Case(about="B1 H8 D128", T=2048, D=128),
    "gqa-2k": Case(about="B1 H8 K2 D64 (SDPA: K, V expanded before)", T=2048, K=2),
    "chunk": Case(about="512 queries at offset 7,680", T=512, S=8192, against="fp32-8k"),
    "packed": Case(about="documents of 512, 512, 2,048 and 5,120", T=8192, options={"cu_seqlens_q": DOCUMENTS},
                   against="fp32-8k", rounds=3),
    "window": Case(about="window 1,024 at 32K against full causal at 32K (minutes)", T=32768,
                   options={"window_size": (1023, 0)}, against="fp32-32k", rounds=2),
    "fp32-32k": Case(about="B1 H8 D64, only as the window's contender", T=32768, rounds=2),
}
DEFAULT = [name for name in CASES if name not in ("window", "fp32-32k")]


def inputs(case: Case, T: int, S: int):
    shapes = ((T, case.H), (S, case.K), (S, case.K), (T, case.H))
    q, k, v, dout = (torch.randn(1, n, h, case.D).to(case.dtype) for n, h in shapes)
    return [x.requires_grad_() for x in (q, k, v)], dout


def check(name: str, case: Case) -> None:
    """Exit unless outputs and gradients equal the float64 reference on at most 600 tokens."""
    T = min(case.T, 600)
    S = T + min(case.keys - case.T, 300)
    options = dict(case.options)
    if "cu_seqlens_q" in options:
        options["cu_seqlens_q"] = options["cu_seqlens_q"] * T // case.T
    if "window_size" in options:
        options["window_size"] = (100, 0)
    qkv, dout = inputs(case, T, S)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    out = attention(*qkv, causal=True, **options)
    exact = attention(*wide, causal=True, backend="reference", **options)
    found = [out, *torch.autograd.grad(out, qkv, dout)]
    expected = [exact, *torch.autograd.grad(exact, wide, dout.double())]
    tolerance = 1e-2 if case.dtype == torch.bfloat16 else 1e-5
    for what, a, b in zip(("out", "dq", "dk", "dv"), found, expected):
        error = float((a.detach().double() - b.detach()).norm() / b.detach().norm())
        if not error <= tolerance:
            sys.exit(f"bench_attention: {name}: {what} is off by {error:.1e} (at most {tolerance:.0e}): not timed")


def ours(case: Case):
    qkv, dout = inputs(case, case.T, case.keys)

    def step():
        torch.autograd.grad(attention(*qkv, causal=True, **case.options), qkv, dout)

    return step


def sdpa(case: Case):
    qkv, dout = inputs(case, case.T, case.keys)
    heads_first = [x.detach().repeat_interleave(case.H // x.shape[2], 2).transpose(1, 2).contiguous() for x in qkv]
    heads_first = [x.requires_grad_() for x in heads_first]
    dout = dout.transpose(1, 2).contiguous()

    def step():
        torch.autograd.grad(F.scaled_dot_product_attention(*heads_first, is_causal=True), heads_first, dout)

    return step


def interleaved(steps: dict, rounds: int, clock) -> dict[str, list[float]]:
    """Seconds of every step, one round after the other; a round before that warms up, unless there is but one."""
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    for number in range(rounds + 1 if rounds > 1 else 1):
        for key, step in steps.items():
            start = clock()
            step()
            if number or rounds == 1:
                seconds[key].append(clock() - start)
    return seconds


@dataclass(frozen=True, kw_only=True)
class Measured:
    """GFLOP/s of the median round; `faster`: median over the rounds of the contender's time over ours."""

    ours: float
    other: float
    matmul: float
    faster: float
    work: float
    """Our arithmetic over the contender's."""


def measure(case: Case, rounds: int, clock) -> Measured:
    other, square = CASES.get(case.against), torch.randn(MATMUL, MATMUL)
    flop = {
        "ours": 14 * case.D * case.H * case.pairs(),
        "other": 14 * case.D * case.H * case.pairs() if other is None else 14 * other.D * other.H * other.pairs(),
        "matmul": 2 * MATMUL**3,
    }
    steps = {"ours": ours(case), "other": sdpa(case) if other is None else ours(other), "matmul": lambda: square @ square}
    seconds = interleaved(steps, min(rounds, case.rounds or rounds), clock)
    rate = {key: flop[key] / statistics.median(seconds[key]) / 1e9 for key in flop}
    faster = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["other"]))
    return Measured(**rate, faster=faster, work=flop["ours"] / flop["other"])


def line(name: str, case: Case, m: Measured) -> str:
    against = case.against if case.against in CASES else "SDPA"
    return (
        f"{name:9s} {m.ours:8.1f} {m.other:8.1f} {m.matmul:8.1f} {m.faster:9.2f} {m.faster * m.work:9.2f} "
        f"{m.ours / m.matmul:9.2f}   {against:9s} {case.about}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=DEFAULT, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=7, help="rounds of a short case (long ones have fewer); default 7")
    parser.add_argument("--threads", type=int, help="torch threads; default torch's own")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of CPU over all threads")
    parser.add_argument("--bounds", action="store_true", help="check the bounds of attention_bounds.py instead; status 1 if one is missed")
    parser.add_argument("--small", action="store_true", help="with --bounds: tiny sizes that exercise the code; verdicts mean nothing")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    qkv, _ = inputs(CASES["fp32-2k"], 8, 8)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.clock} clock, forward + backward")
    print(explain(*qkv, causal=True))
    if arguments.bounds:
        from attention_bounds import check_bounds

        sys.exit(check_bounds(arguments.rounds, clock, arguments.small))
    print("GFLOP/s       ours    other   matmul  x faster  x GFLOP/s  of matmul  other")
    for name in arguments.cases:
        case = CASES[name]
        check(name, case)
        print(line(name, case, measure(case, arguments.rounds, clock)), flush=True)


if __name__ == "__main__":
    main()
