"""One method's training step in a process of its own: the parent asks it to warm up, to take a timed step, to measure memory.

    python tools/step_process.py '<task as JSON>' METHOD GRADIENTS.pt     requests from stdin, one a line; answers in JSON, one a line
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The shape of a step."""

    layers: int
    hidden: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int | None
    window: list | None
    tie_embeddings: bool
    tokens: int
    batch: int
    dtype: str
    device: str
    chunk: int
    plan: str
    warmup_tokens: int | None
    disk: str = "."

    @classmethod
    def from_arguments(cls, arguments: dict, tokens: int) -> Task:
        return cls(tokens=tokens, **{f.name: arguments[f.name] for f in dataclasses.fields(cls) if f.name in arguments})


class StepProcess:
    """The parent's end: `ask` a request, get its answer. Close it, or use it in a `with`."""

    def __init__(self, task: Task, method: str, environment: dict[str, str], gradients: Path) -> None:
        """`gradients`: the file that "warm-up with gradients" writes."""
        self.method = method
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(dataclasses.asdict(task)), method, str(gradients)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})

    def ask(self, request: str) -> dict:
        """Raises RuntimeError when the process died; its own message is on stderr."""
        try:
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"{self.method}: its process ended with status {self.process.wait()} at {request!r}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> StepProcess:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def machine() -> dict:
    """What the numbers were taken on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(), "gpu": gpu,
            "cpu": torch.backends.cpu.get_cpu_capability(), "processors": os.cpu_count()}


def serve(task: Task, method: str, gradients: Path) -> None:
    from step_methods import prepare

    import longtrain as lt
    from longtrain.nn import ModelConfig

    imported = status_bytes("VmRSS")
    windows = None if not task.window else tuple(None if w in ("full", None) else int(w) for w in task.window)
    config = ModelConfig(
        vocab_size=task.vocab, num_layers=task.layers, hidden_size=task.hidden, intermediate_size=task.ffn, num_heads=task.heads,
        num_kv_heads=task.kv_heads, head_dim=task.head_dim, window=windows, tie_embeddings=task.tie_embeddings)
    name, _, given = method.partition(":")
    if name.startswith("streamed"):
        method = f"{name}:" + ",".join(filter(None, [task.plan, given]))
    device = torch.device(task.device)
    model, step = prepare(
        method,
        config,
        lt.Plan(chunk_tokens=task.chunk),
        device=task.device,
        dtype=getattr(torch, task.dtype),
        disk=task.disk,
        tokens=task.tokens,
    )
    ids_BT = torch.randint(0, task.vocab, (task.batch, task.tokens), generator=torch.Generator().manual_seed(1)).to(device)

    def whole_step(ids: torch.Tensor = ids_BT) -> torch.Tensor:
        loss = step(ids)
        loss.backward()
        return loss.detach()

    for request in map(str.strip, sys.stdin):
        model.zero_grad(set_to_none=True)
        if request == "warm-up":
            answer = {"loss": whole_step(ids_BT[:, :task.warmup_tokens]).item()}
        elif request == "warm-up with gradients":
            answer = {"loss": whole_step().item(), "gradients": str(gradients)}
            torch.save({name: p.grad.cpu() for name, p in model.named_parameters()}, gradients)
        elif request == "time":
            cpu = time.process_time()
            answer = {"wall": seconds(whole_step, device)}
            answer["cpu"] = time.process_time() - cpu
        elif request == "memory":
            answer = memory(whole_step, device)
            answer["whole"] = answer["base"] + answer["peak"] - (0 if device.type == "cuda" else imported)
        else:
            raise ValueError(f"unknown request {request!r}")
        print(json.dumps(answer), flush=True)


def seconds(step, device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def memory(step, device: torch.device) -> dict:
    """{"base", "peak": bytes above the base, "how"} of one step."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return {"base": base, "peak": torch.cuda.max_memory_allocated() - base, "how": "torch.cuda.max_memory_allocated"}
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except PermissionError:
        return _sampled(step)
    base = status_bytes("VmHWM")
    step()
    return {"base": base, "peak": status_bytes("VmHWM") - base, "how": "VmHWM"}


def _sampled(step) -> dict:
    """Where the kernel's high-water mark may not be reset: resident memory every millisecond, which can miss a short peak."""
    base = peak = status_bytes("VmRSS")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, status_bytes("VmRSS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        step()
    finally:
        done.set()
        watcher.join()
    return {"base": base, "peak": max(peak, status_bytes("VmRSS")) - base, "how": "sampled VmRSS"}


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))


if __name__ == "__main__":
    serve(Task(**json.loads(sys.argv[1])), sys.argv[2], Path(sys.argv[3]))
