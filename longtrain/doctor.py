"""`longtrain doctor`: what this machine is, which backend serves which op and why the others do not, and a self-test of seconds."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from longtrain import _extension as extension
from longtrain import backends
from longtrain.ops.attention import attention
from longtrain.ops.linear_attention import linear_attention
from longtrain.ops.linear_cross_entropy import linear_cross_entropy
from longtrain.ops.long_conv import long_conv

LIBRARIES = ("torch", "numpy", "einops", "PyYAML", "safetensors", "triton", "transformers", "flash-attn", "matplotlib")


def run() -> int:
    """Print everything; 0 if the self-test passed, 1 if not."""
    for title, lines in (("machine", machine()), ("software", software()), ("backends", backend_table())):
        print(f"{title}\n" + "\n".join(f"  {line}" for line in lines) + "\n", flush=True)
    print("self-test: gradients against the reference in float64")
    print(f"  {'op':<22}{'dtype':<10}{'backend':<10}{'forward error':>14}{'gradient error':>16}{'allowed':>10}{'ms':>9}")
    failures = 0
    for line, passed in self_test():
        failures += not passed
        print(f"  {line}", flush=True)
    print("\nall well" if not failures else f"\n{failures} self-tests FAILED: results of these ops on this machine are wrong")
    return 1 if failures else 0


def machine() -> Iterator[str]:
    """Processor, memory, disk and GPUs."""
    yield (
        f"{'processor':<12}{_processor()}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores "
        f"usable, {torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    yield f"{'memory':<12}{_memory()}"
    for name, path in (("disk here", Path.cwd()), ("temporary", Path(tempfile.gettempdir()))):
        usage = shutil.disk_usage(path)
        yield f"{name:<12}{usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f}, {path}"
    if not torch.cuda.is_available():
        yield f"{'GPU':<12}none that torch {torch.__version__} can use"
        return
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        yield (
            f"{'GPU ' + str(index):<12}{p.name}, {p.total_memory / 2**30:.1f} GiB, sm_{p.major}{p.minor}, "
            f"{p.multi_processor_count} multiprocessors, "
            f"CUDA {torch.version.cuda}"
        )


def software() -> Iterator[str]:
    """Versions, compiler and the state of the C++ extension."""
    yield f"{'python':<12}{sys.version.split()[0]} ({sys.executable}) on {platform.system()} {platform.release()}"
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    yield f"{'libraries':<12}{', '.join(found)}"
    yield f"{'compiler':<12}{_compiler()}"
    yield f"{'extension':<12}{_extension_state()}"


def backend_table() -> Iterator[str]:
    """One line a typical call, then every reason once."""
    served = backends.explain()
    width = max(len(s.case) for s in served)
    for s in sorted(served, key=lambda s: s.op):
        yield f"{s.op:<22}{s.case:<{width + 2}}{s.backend}"
    for op in sorted({s.op for s in served}):
        reasons = dict.fromkeys((name, why) for s in served if s.op == op for name, why in s.refusals.items())
        for name, why in reasons:
            yield f"{op} not by {name}: {why}"


def self_test() -> Iterator[tuple[str, bool]]:
    """(line, passed) for each op's own choice of backend, in float32 and in bfloat16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        for op, call, inputs in _trials(device, dtype):
            chosen = _chosen(op, call, inputs)
            _forward_and_backward(call, inputs, "auto")  # the first call pays for loading kernels
            start = time.perf_counter()
            ours = _forward_and_backward(call, inputs, "auto")
            if device.type == "cuda":
                torch.cuda.synchronize()
            milliseconds = 1e3 * (time.perf_counter() - start)
            exact = _forward_and_backward(call, [x.double() for x in inputs], "reference")
            forward, backward = _error(ours[:1], exact[:1]), _error(ours[1:], exact[1:])
            # Both see the same inputs: what remains is a few roundings of the dtype, and of float32 sums.
            allowed = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-5
            passed = forward <= allowed and backward <= allowed
            yield (f"{op:<22}{str(dtype).removeprefix('torch.'):<10}{chosen:<10}{forward:>14.1e}{backward:>16.1e}{allowed:>10.1e}"
                   f"{milliseconds:>9.1f}{'' if passed else '  FAILED'}"), passed


def _trials(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., Tensor], list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    target = torch.randint(0, 501, (300,), generator=generator).to(device)
    yield ("attention", lambda q, k, v, backend: attention(q, k, v, causal=True, backend=backend),
           [random(1, 129, 4, 32), random(1, 300, 2, 32), random(1, 300, 2, 32)])
    yield ("linear_cross_entropy", lambda x, w, backend: linear_cross_entropy(x, w, target, chunk_tokens=128, backend=backend),
           [random(300, 64), random(501, 64)])
    yield ("linear_attention", lambda q, k, v, g, b, backend: linear_attention(
               q, torch.nn.functional.normalize(k, dim=-1), v, decay=-g.abs(), beta=b.sigmoid(), backend=backend),
           [random(1, 300, 2, 32), random(1, 300, 2, 32), random(1, 300, 2, 32), random(1, 300, 2, 32), random(1, 300, 2)])
    yield ("long_conv", lambda u, k, skip, a, b, backend: long_conv(u, k, skip, a, b, backend=backend),
           [random(1, 300, 6), random(6, 300), random(6), random(1, 300, 6), random(1, 300, 6)])


def _chosen(op: str, call: Callable[..., Tensor], inputs: list[Tensor]) -> str:
    names = {
        "attention": ("q", "k", "v"),
        "linear_cross_entropy": ("input", "weight"),
        "linear_attention": ("q", "k", "v", "decay", "beta"),
        "long_conv": ("u", "k", "skip", "gate_in", "gate_out"),
    }[op]
    arguments = dict(zip(names, inputs, strict=True))
    if op == "attention":
        arguments["causal"] = True
    if op == "linear_cross_entropy":
        arguments["target"] = torch.zeros(inputs[0].shape[0], dtype=torch.int64, device=inputs[0].device)
    return backends.explain(op, **arguments)[0].backend


def _forward_and_backward(call: Callable[..., Tensor], inputs: list[Tensor], backend: str) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = call(*leaves, backend=backend)
        upstream = torch.linspace(-1, 2, out.numel(), device=out.device).cos().to(torch.bfloat16).to(out.dtype).view(out.shape)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def _error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """Largest relative error in norm; infinite where something is not finite."""
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True)]
    return max(e if e == e else float("inf") for e in errors)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> str:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return "unknown (no /proc/meminfo)"
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if line.endswith("kB")}
    text = f"{sizes['MemAvailable'] / 2**30:.1f} GiB available of {sizes['MemTotal'] / 2**30:.1f}"
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (value := limit.read_text().strip()) != "max":
        text += f", limited to {int(value) / 2**30:.1f} GiB by its control group"
    return text


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if path := shutil.which(name.split()[0]):
            version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
            return f"{path}: {version[0] if version else 'gave no version'}"
    return "none found (CXX, c++, g++, clang++): the CPU kernels cannot be built; everything runs on torch alone"


def _extension_state() -> str:
    return "loaded" if extension.MISSING is None else f"NOT loaded: {extension.MISSING}"
