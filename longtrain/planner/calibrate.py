"""`longtrain calibrate`: measure what a step's time is made of on this machine, and write it down for `longtrain plan --device FILE`.

    longtrain calibrate [--out machine.json] [--path DIR] [--dtype bfloat16]

Products of many rows with matrices of several sizes, attention by the backend that serves it, element-wise operations, launches, AdamW,
copies to the host, the disk tier's own code on --path, and all-gather where several processes run it (torchrun). Each is repeated until
`SECONDS` are over, and the median counts; half a minute in all.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

import longtrain as lt
from longtrain.offload import DiskSettings, Place, Stored, TieredStore
from longtrain.planner.machines import Machine
from longtrain.planner.rates import Rates, Table
from longtrain.span import Span
from longtrain.units import format_bytes

SECONDS = 0.6
"""Of each measurement, after one call that is not counted."""

SHAPES = {
    "cpu": {"rows": 512, "sizes": (32, 128, 256, 512, 1024), "tokens": 2048, "heads": 4, "dims": (32, 64, 128), "elements": 1 << 19},
    "cuda": {"rows": 8192, "sizes": (512, 1024, 2048, 4096), "tokens": 16384, "heads": 16, "dims": (64, 128), "elements": 1 << 26},
}
"""`elements`: of an element-wise operation, as many as a chunk has of a layer's widest activation."""

MOVED = 64 << 20
"""Bytes that go to a tier and back."""


def run(out: str | None, path: str, dtype: str | None) -> int:
    """Measure, print as it goes, write the profile. Exit code 0."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    chosen = getattr(torch, dtype) if dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    began = time.perf_counter()
    machine = calibrate(device, chosen, Path(path), say=lambda text: print(text, flush=True), name=name)
    target = Path(out or "machine.json")
    if not dist.is_initialized() or dist.get_rank() == 0:
        machine.save(target)
        print(f"{target} is for longtrain plan --device {target}; {time.perf_counter() - began:.0f} s")
    return 0


def calibrate(device: torch.device, dtype: torch.dtype, path: Path, *, say: Callable[[str], object], name: str = "") -> Machine:
    """Rates of `device` in `dtype`, and of the disk under `path`. Raises ValueError where that is no directory to write to."""
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise ValueError(f"calibrate: {path} is no directory that can be written to; give --path one on the disk that is to be a tier")
    shape, found = SHAPES[device.type], {}

    def measured(what: str, rates: Iterator[tuple[int, float]], unit: float, of: str) -> Table:
        table = []
        for size, rate in rates:
            table.append((size, rate))
            say(f"{what} at {size}: {rate / unit:,.3g} {of}")
        return tuple(table)

    flop = (1e12, "TFLOP/s") if device.type == "cuda" else (1e9, "GFLOP/s")
    found["products"] = measured("matrix products", products(device, dtype, shape), *flop)
    found["attention"] = measured("attention, head dim", attention(device, dtype, shape, backward=False), *flop)
    found["attention_backward"] = measured("its backward pass", attention(device, dtype, shape, backward=True), *flop)
    singles = {
        "moved": lambda: elementwise(device, dtype, shape["elements"]),
        "optimizer": lambda: adamw(device, shape["elements"]),
        "host_optimizer": lambda: adamw(torch.device("cpu"), SHAPES["cpu"]["elements"]),
    }
    for key, measure in singles.items():
        found[key] = measure()
        say(f"{key}: {format_bytes(found[key])}/s")
    found["launch"] = launch(device)
    say(f"launch: {found['launch'] * 1e6:.1f} us an operation")
    for tier in ("host", "disk"):
        found[f"{tier}_write"], found[f"{tier}_read"] = through_tier(device, tier, path)
        say(f"{tier}: {format_bytes(found[f'{tier}_write'])}/s there, {format_bytes(found[f'{tier}_read'])}/s back")
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        found["link"] = gathered(device)
        say(f"all-gather: {format_bytes(found['link'])}/s received")
    top = max(rate for _, rate in found["products"])
    memory = (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    source = f"longtrain calibrate, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
    return Machine(name=name, device=device.type, memory=memory, rates=Rates(flops=top, **found), peak_flops=top, source=source)


def seconds_of(call: Callable[[], object], device: torch.device, at_least: float = SECONDS) -> float:
    """Of one call, the median of as many as `at_least` seconds hold, three at least."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    call()
    wait()
    took, began = [], time.perf_counter()
    while len(took) < 3 or time.perf_counter() - began < at_least:
        start = time.perf_counter()
        call()
        wait()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def products(device: torch.device, dtype: torch.dtype, shape: dict) -> Iterator[tuple[int, float]]:
    """Rows by a matrix of which one side is the size and the other four times that, as in a layer's MLP: forward and both gradients."""
    for size in shape["sizes"]:
        x = torch.randn(shape["rows"], size, device=device, dtype=dtype)
        w = torch.randn(4 * size, size, device=device, dtype=dtype)
        dy = torch.randn(shape["rows"], 4 * size, device=device, dtype=dtype)
        yield size, 6 * x.numel() * 4 * size / seconds_of(lambda: (x @ w.T, dy @ w, dy.T @ x), device)


def attention(device: torch.device, dtype: torch.dtype, shape: dict, *, backward: bool) -> Iterator[tuple[int, float]]:
    """Causal, four query heads on one of keys; FLOP of the pairs that are visible."""
    tokens, heads = shape["tokens"], shape["heads"]
    for dim in shape["dims"]:
        q, dout = (torch.randn(1, tokens, heads, dim, device=device, dtype=dtype) for _ in range(2))
        k, v = (torch.randn(1, tokens, heads // 4, dim, device=device, dtype=dtype) for _ in range(2))
        out, lse = lt.ops.attention(q, k, v, causal=True, return_lse=True)
        dk, dv = (torch.zeros(t.shape, device=device) for t in (k, v))
        flops = 4 * heads * dim * tokens * (tokens + 1) / 2
        if backward:
            call = lambda: lt.ops.attention_backward(dout, q, k, v, out, lse, dk=dk, dv=dv, causal=True)
            yield dim, 2.5 * flops / seconds_of(call, device)
        else:
            yield dim, flops / seconds_of(lambda: lt.ops.attention(q, k, v, causal=True), device)


def elementwise(device: torch.device, dtype: torch.dtype, elements: int) -> float:
    """Bytes/s of products and sums into new memory, as a layer has them."""
    a, b = (torch.randn(elements, device=device, dtype=dtype) for _ in range(2))
    return 2 * 3 * a.nbytes / seconds_of(lambda: (a * b, a + b), device)


def launch(device: torch.device) -> float:
    """Seconds of an operation on next to nothing, through Python and autograd."""
    x = torch.zeros(8, device=device, requires_grad=True)

    def twenty() -> None:
        y = x
        for _ in range(20):
            y = y + 1

    return seconds_of(twenty, device) / 20


def adamw(device: torch.device, elements: int) -> float:
    """Bytes/s of the fused update, 28 bytes a parameter."""
    weight = torch.nn.Parameter(torch.randn(elements, device=device))
    weight.grad = torch.randn_like(weight)
    update = torch.optim.AdamW([weight], fused=True).step
    return 28 * elements / seconds_of(update, device)


def through_tier(device: torch.device, tier: str, path: Path) -> tuple[float, float]:
    """Bytes/s into a tier and back by the token store, checksums included."""
    rows, spans = torch.randn(1, 256, MOVED // 16 // 256 // 4, device=device), [Span(256 * i, 256 * i + 256) for i in range(16)]
    with tempfile.TemporaryDirectory(dir=path) as directory:
        settings = {"host_bytes": 2 * MOVED} if tier == "host" else {"disk": DiskSettings(path=directory, budget=2 * MOVED)}
        store = TieredStore(device, **settings)
        took = []
        for _ in range(3):
            stored = Stored(store, "calibration", lambda span: Place(tier=tier))
            began = time.perf_counter()
            for span in spans:
                stored.put(span, rows.clone())
            store.settle()
            between = time.perf_counter()
            store.prefetch((stored.name, span) for span in spans)
            for span in spans:
                stored.take(span)
            took.append((between - began, time.perf_counter() - between))
            del stored
        store.close()
    write, read = (statistics.median(t[i] for t in took) for i in (0, 1))
    return MOVED / write, MOVED / read


def gathered(device: torch.device) -> float:
    """Bytes/s that a rank receives in an all-gather; the group is made here where there is none."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    world = dist.get_world_size()
    own = torch.zeros((64 << 20) // world // 4 if device.type == "cuda" else 1 << 20, device=device)
    whole = torch.empty(world * own.numel(), device=device)
    repeats = 10  # the same number on every rank
    took = []
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        dist.all_gather_into_tensor(whole, own)
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return own.nbytes * (world - 1) / statistics.median(took[1:])
