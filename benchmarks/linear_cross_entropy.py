"""Time and memory of one forward and backward of each `linear_cross_entropy` backend.

    python benchmarks/linear_cross_entropy.py [--tokens 8192 --width 256 --vocab 8192 --dtype float32 --chunks 128 256 512 1024]

Each row runs in a process of its own: once for its gradients' error against the float64 reference, then for the median of
`--repeats` times, then for the peak of resident memory above the inputs and their gradients.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from longtrain.ops.linear_cross_entropy import linear_cross_entropy


def peak_bytes() -> int:
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))


def measure(a: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    dtype = getattr(torch, a.dtype)
    x = torch.randn(a.tokens, a.width).to(dtype).requires_grad_()
    w = (torch.randn(a.vocab, a.width) / a.width ** 0.5).to(dtype).requires_grad_()
    t = torch.randint(0, a.vocab, (a.tokens,))

    def step():
        x.grad = w.grad = None
        loss = linear_cross_entropy(x, w, t, backend=a.backend, chunk_tokens=a.chunk or None)
        loss.backward()
        return loss.item()

    step()
    times = []
    for _ in range(a.repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    x.grad = w.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    base = peak_bytes()
    step()
    peak = peak_bytes() - base
    small = slice(0, min(a.tokens, 512))
    xs, ws = x[small].detach().double().requires_grad_(), w.detach().double().requires_grad_()
    linear_cross_entropy(xs, ws, t[small], backend="reference").backward()
    xo, wo = x[small].detach().requires_grad_(), w.detach().requires_grad_()
    linear_cross_entropy(xo, wo, t[small], backend=a.backend, chunk_tokens=a.chunk or None).backward()
    error = max(((ours.grad - exact.grad).norm() / exact.grad.norm()).item() for ours, exact in ((xo, xs), (wo, ws)))
    return {"backend": a.backend, "chunk": a.chunk, "ms": round(1e3 * sorted(times)[len(times) // 2], 1), "peak_mb": round(peak / 1e6, 1),
            "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 8192), ("width", 256), ("vocab", 8192), ("repeats", 5), ("chunk", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--chunks", type=int, nargs="*", default=[128, 256, 512, 1024])
    parser.add_argument("--backend", help="measure this one in this process and print JSON")
    a = parser.parse_args()
    if a.backend:
        print(json.dumps(measure(a)))
        return
    rows = (
        [("reference", 0), ("torch", 0)] + [(backend, chunk) for chunk in a.chunks for backend in ("torch", "chunked")] + [("chunked", 0)]
    )
    print(f"N={a.tokens} E={a.width} V={a.vocab} {a.dtype} torch {torch.__version__} threads {torch.get_num_threads()}")
    print(f"{'backend':>10} {'chunk':>8} {'ms':>9} {'peak MB':>9} {'error':>9}")
    for backend, chunk in rows:
        command = [sys.executable, __file__, "--backend", backend, "--chunk", str(chunk), "--dtype", a.dtype,
                   *(f"--{name}={getattr(a, name)}" for name in ("tokens", "width", "vocab", "repeats"))]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
        if done.returncode:
            print(f"{backend:>10} {chunk or 'default':>8} {done.stderr.strip().splitlines()[-1]}")
            continue
        row = json.loads(done.stdout)
        print(f"{backend:>10} {chunk or 'default':>8} {row['ms']:9.1f} {row['peak_mb']:9.1f} {row['error']:9.1e}", flush=True)


if __name__ == "__main__":
    main()
