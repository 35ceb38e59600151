"""Speed of attention on this CPU: ours, torch's SDPA and a plain matmul, interleaved; nothing is timed that is wrong.

    python tools/bench_attention.py                       # every case but `window`, about two minutes on two cores
    python tools/bench_attention.py --cases fp32-8k chunk --rounds 9
    python tools/bench_attention.py --clock cpu           # on a machine with other work: time on the CPU, not on the wall

Each case is first compared with the float64 reference on a shorter sequence. GFLOP/s count the visible (query, key)
pairs only: 4 D a pair and head forward, 10 D backward. Every round times all contenders once, in turn; rates are of the
median round, ratios the median of the rounds' ratios (above 1: ours is faster).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
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


def timed(step, clock) -> float:
    start = clock()
    step()
    return clock() - start


def measure(name: str, case: Case, rounds: int, clock) -> str:
    """One line of the table."""
    other = CASES.get(case.against)
    square = torch.randn(MATMUL, MATMUL)
    contenders = {
        "ours": (ours(case), 14 * case.D * case.H * case.pairs()),
        "other": (sdpa(case), 14 * case.D * case.H * case.pairs()) if other is None
        else (ours(other), 14 * other.D * other.H * other.pairs()),
        "matmul": (lambda: square @ square, 2 * MATMUL**3),
    }
    seconds: dict[str, list[float]] = {key: [] for key in contenders}
    for number in range(rounds + 1):
        for key, (step, _) in contenders.items():
            elapsed = timed(step, clock)
            if number or case.rounds == 1:  # the first round warms up
                seconds[key].append(elapsed)
    rate = {key: flop / statistics.median(seconds[key]) / 1e9 for key, (_, flop) in contenders.items()}
    time_ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["other"]))
    work = contenders["ours"][1] / contenders["other"][1]
    against = "SDPA" if other is None else case.against
    return (
        f"{name:9s} {rate['ours']:8.1f} {rate['other']:8.1f} {rate['matmul']:8.1f} "
        f"{time_ratio:9.2f} {time_ratio * work:9.2f} {rate['ours'] / rate['matmul']:9.2f}   {against:9s} {case.about}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=DEFAULT, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=7, help="rounds of a short case (long ones have fewer); default 7")
    parser.add_argument("--threads", type=int, help="torch threads; default torch's own")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of CPU over all threads")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    qkv, _ = inputs(CASES["fp32-2k"], 8, 8)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.clock} clock, forward + backward")
    print(explain(*qkv, causal=True))
    print("GFLOP/s       ours    other   matmul  x faster  x GFLOP/s  of matmul  other")
    for name in arguments.cases:
        case = CASES[name]
        check(name, case)
        print(measure(name, case, min(arguments.rounds, case.rounds or arguments.rounds), clock), flush=True)


if __name__ == "__main__":
    main()
