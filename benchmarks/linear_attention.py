"""Time and memory of one forward and backward pass of `linear_attention` by each backend, beside softmax attention of the same shape.

    python benchmarks/linear_attention.py [--tokens 8192 --heads 4 --dim 64 --dtype float32 --backends cpp chunked --chunks 64 --repeats 5]

Gated is a pass only where the gradients are right: each row first compares them with the recurrence in float64, on 256 tokens. Times are
medians of processor time (of the clock on a GPU), rows interleaved.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from longtrain.ops import attention, linear_attention
from longtrain.ops.linear_attention import explain, footprint_bytes

KINDS = {
    "plain": (None, False),
    "head": ("head", False),
    "feature": ("feature", False),
    "delta": (None, True),
    "gated delta": ("head", True),
}
BOUND = 2.0
"""Gradients may be this many roundings of the dtype (of float32: 20) away from the recurrence in float64."""


def tensors(a: argparse.Namespace, tokens: int, forget: str | None, delta: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, tokens, a.heads, *shape, generator=generator)

    data = {"q": normal(a.dim), "k": F.normalize(normal(a.dim), dim=-1), "v": normal(a.dim)}
    if forget is not None:
        data["decay"] = -0.05 * normal(*([a.dim] if forget == "feature" else [])).exp()
    if delta:
        data["beta"] = normal().sigmoid()
    return {name: t.to(a.device, getattr(torch, a.dtype)).requires_grad_() for name, t in data.items()}


def step(run, data: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    out = run(**data)
    return torch.autograd.grad(out, list(data.values()), torch.ones_like(out))


def error(a: argparse.Namespace, forget: str | None, delta: bool, **options) -> float:
    data = tensors(a, 256, forget, delta)
    exact = {name: t.detach().double().requires_grad_() for name, t in data.items()}
    ours = step(lambda **x: linear_attention(**x, **options), data)
    theirs = step(lambda **x: linear_attention(**x, backend="reference"), exact)
    return max(float((x.double() - y).norm() / y.norm()) for x, y in zip(ours, theirs))


def seconds(run, data: dict[str, torch.Tensor], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    step(run, data)
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 8192), ("heads", 4), ("dim", 64), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backends", nargs="+", help="all but the reference that serve this device")
    parser.add_argument("--chunks", type=int, nargs="+", default=[64])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()

    allowed = 20 * torch.finfo(torch.float32).eps if a.dtype == "float32" else BOUND * torch.finfo(torch.bfloat16).eps
    rows = {"softmax attention": (lambda q, k, v: attention(q, k, v, causal=True), tensors(a, a.tokens, None, False), 0.0, 0)}
    reasons = explain(**tensors(a, 1, None, False))
    backends = a.backends or [name for name, reason in reasons.items() if reason is None and name != "reference"]
    for kind, (forget, delta) in KINDS.items():
        for backend, chunk in ((backend, chunk) for backend in backends for chunk in a.chunks):
            name, options = f"{kind}, {backend}, chunks of {chunk}", dict(backend=backend, chunk_size=chunk)
            found = error(a, forget, delta, **options)
            if found > allowed:
                print(f"{name}: WRONG, gradients are {found:.1e} off, allowed {allowed:.1e}")
                raise SystemExit(1)
            rows[name] = (lambda options=options, **x: linear_attention(**x, **options), tensors(a, a.tokens, forget, delta), found, chunk)
    times: dict[str, list[float]] = {name: [] for name in rows}
    for repeat in range(a.repeats + 1):
        for name, (run, data, *_) in rows.items():
            spent = seconds(run, data, a.device)
            times[name] += [spent] if repeat else []  # the first is a warm-up
    print(f"{a.tokens} tokens, {a.heads} heads of {a.dim}, {a.dtype}, {a.device}, {torch.get_num_threads()} threads")
    for name, (_, data, found, chunk) in rows.items():
        delta, forget = "beta" in data, data.get("decay")
        decays = 0 if forget is None else 1 if forget.dim() == 3 else a.dim
        workspace = footprint_bytes(a.tokens, a.heads, a.dim, a.dim, decays=decays, delta=delta, chunk_size=chunk, device=a.device)
        said = "" if name.startswith("softmax") else f"  workspace {workspace / 1e6:6.1f} MB  gradients {found:.0e} off"
        print(f"{name:36} {1e3 * median(times[name]):9.1f} ms{said}")


if __name__ == "__main__":
    main()
