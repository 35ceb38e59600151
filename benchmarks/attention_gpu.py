"""Speed of the Triton attention kernels on a GPU, each choice of tiles, beside the libraries' kernels; nothing is timed that is wrong.

    python benchmarks/attention_gpu.py [--cases d128 chunk --rounds 5]
    TRITON_INTERPRET=1 python benchmarks/attention_gpu.py --tiny      # no GPU: proves that it runs

Each backend is first compared with the float64 reference on 1,024 tokens: bf16 errors of out, dq, dk and dv at most 2^-7. Then rounds
in which all take their turn; medians. TFLOP/s count visible pairs: 4 D a pair and head forward, 10 D backward; a single kernel counts the
products that it makes (dk_dv 8 D, dq 6 D).
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from longtrain.kernels.attention_configs import Tiles
from longtrain.ops.attention import attention, attention_backward, explain, triton
from longtrain.ops.attention.interface import checked_call

BACKENDS = ("triton", "flash", "cudnn", "flash_attn_3", "flash_attn_4")
LARGEST_ERROR = 2**-7


@dataclass(frozen=True, kw_only=True)
class Case:
    """Causal, batch 1. S: keys, if more than queries (a chunk at an offset)."""

    T: int = 16384
    S: int | None = None
    H: int = 32
    K: int = 8
    D: int = 128
    options: dict = field(default_factory=dict)

    def pairs(self) -> int:
        """Visible (query, key) pairs of one head, without kept blocks."""
        keys = self.S or self.T
        window = self.options.get("window_size", (keys, 0))[0] + 1
        return sum(min(window, keys - self.T + i + 1) for i in range(self.T))


CASES = {
    "d128": Case(), "d64": Case(D=64), "d256": Case(D=256, H=16, K=4), "mha": Case(H=16, K=16), "chunk": Case(S=131072),
    "window": Case(options={"window_size": (1023, 0)}), "softcap": Case(options={"softcap": 30.0}),
    "kept-blocks": Case(options={"window_size": (1023, 0), "block_stride": 16}),
}


def inputs(case: Case, device: str, dtype: torch.dtype) -> tuple:
    """q, k, v, dout and zeroed dk, dv."""
    S = case.S or case.T
    shapes = ((case.T, case.H), (S, case.K), (S, case.K), (case.T, case.H))
    q, k, v, dout = (torch.randn(1, tokens, heads, case.D, device=device).to(dtype) for tokens, heads in shapes)
    return q, k, v, dout, torch.zeros(k.shape, device=device), torch.zeros(v.shape, device=device)


def contenders(case: Case, q, k, v, dout, dk, dv) -> dict:
    """Name -> (forward, backward), the Triton kernels once for every choice of tiles."""
    refusals = explain(q, k, v, causal=True, **case.options, kernel_fallback="warn").refusals
    found = {}
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend="triton", **case.options)
    for name in (name for name in BACKENDS if name not in refusals):
        arguments = dict(causal=True, backend=name, **case.options)
        found[name] = (lambda a=arguments: attention(q, k, v, **a),
                       lambda a=arguments: attention_backward(dout, q, k, v, out, lse, dk=dk, dv=dv, **a))
    call = checked_call(q, k, v, causal=True, **case.options)
    rows = lse.transpose(1, 2).contiguous()
    for kernel in ("forward", "dk_dv", "dq"):
        for tiles in triton.tiles_of(kernel, call):
            found[f"{kernel} {tiles.block_q}x{tiles.block_k} w{tiles.warps} s{tiles.stages}{' box' if tiles.boxes else ''}"] = kernel_run(
                kernel, tiles, call, q, k, v, dout, out, lse, rows, dk, dv)
    return found


def kernel_run(kernel: str, tiles: Tiles, call, q, k, v, dout, out, lse, rows, dk, dv) -> tuple:
    if kernel == "forward":
        return triton.forward_launch(call, tiles, q, k, v, None, out, lse).run, None
    if kernel == "dq":
        return None, triton.dq_launch(call, tiles, q, k, v, dout, rows, rows, torch.empty_like(q)).run
    launches = list(triton.dk_dv_launches(call, tiles, q, k, v, dout, rows, rows, dk, dv))
    return None, lambda: [launch.run() for launch in launches]


def errors(case: Case, device: str, dtype: torch.dtype, backend: str) -> float:
    """The worst relative error on a short sequence, against float64."""
    T = min(case.T, 1024)
    q, k, v, dout, dk, dv = inputs(Case(T=T, S=T + T // 2 if case.S else None, H=2 * case.H // case.K, K=2, D=case.D), device, dtype)
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend=backend, **case.options)
    dq = attention_backward(dout, q, k, v, out, lse, dk=dk, dv=dv, causal=True, backend=backend, **case.options)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    exact = attention(*wide, causal=True, backend="reference", **case.options)
    gradients = torch.autograd.grad(exact, wide, dout.double())
    pairs = zip((out, dq, dk, dv), (exact.detach(), *gradients))
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def seconds(run, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="64 tokens, on the CPU in Triton's interpreter")
    a = parser.parse_args()
    device, dtype = ("cpu", torch.float16) if a.tiny else ("cuda", torch.bfloat16)
    for name in a.cases:
        case = CASES[name]
        if a.tiny:
            case = Case(T=64, S=96 if case.S else None, H=2, K=1, D=case.D // 4, options=case.options)
        tensors = inputs(case, device, dtype)
        refusals = explain(*tensors[:3], causal=True, **case.options, kernel_fallback="warn").refusals
        wrong = {b: errors(case, device, dtype, b) for b in BACKENDS if b not in refusals}
        if any(not error <= LARGEST_ERROR for error in wrong.values()):
            raise SystemExit(f"{name}: wrong, so not timed: {wrong}")
        runs = contenders(case, *tensors)
        times = {(who, which): [] for who, pair in runs.items() for which, run in enumerate(pair) if run}
        for number in range(a.rounds + 2):  # two rounds to warm up
            for (who, which), found in times.items():
                took = seconds(runs[who][which], device)
                if number >= 2:
                    found.append(took)
        print(f"{name}: {case}, worst errors {', '.join(f'{b} {e:.1e}' for b, e in wrong.items())}")
        for (who, which), found in times.items():
            per_pair = 10 if which and who in runs and runs[who][0] else {"dk_dv": 8, "dq": 6}.get(who.split()[0], 4)
            rate = per_pair * case.D * case.H * case.pairs() / statistics.median(found) / 1e12
            print(f"  {who:28} {('forward', 'backward')[which]:9} {1e3 * statistics.median(found):10.3f} ms {rate:8.1f} TFLOP/s")


if __name__ == "__main__":
    main()
