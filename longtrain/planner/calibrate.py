"""`longtrain calibrate`: measure what a step's time is made of on this machine, and write it down for `longtrain plan --device FILE`.

    longtrain calibrate [--out machine.json] [--path DIR] [--dtype bfloat16]

Products of many rows with matrices of several sizes, attention and other mixers by the backends that serve them, the operations that layers
and losses are made of one by one, the time that streaming takes for an operation on next to nothing, new memory, AdamW, copies to the host,
the disk tier's own code on --path, what steps take longer than their parts, and all-gather where several processes run it (torchrun).
Each is repeated until `measure.SECONDS` are over, steps of several models `measure_steps.ROUNDS` times in turn, and the mean counts;
a minute or two in all. New memory costs what the allocator makes of it, so calibrate under the settings that training will have: with
glibc's MALLOC_MMAP_THRESHOLD_ every larger block is fetched from the system, cleared, and given back.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path

import torch
import torch.distributed as dist

from longtrain.config.nodes import COMMAND_LINE, ConfigError
from longtrain.offload import DiskSettings, Place, Stored, TieredStore
from longtrain.planner import measure
from longtrain.planner.machines import Machine, memory_of
from longtrain.planner.measure_steps import ROUNDS, Steps
from longtrain.planner.rates import Rates, Table
from longtrain.span import Span
from longtrain.units import format_bytes

SHAPES = {
    "cpu": {
        "rows": 512,
        "width": 256,
        "sizes": (32, 128, 256, 512, 1024),
        "tokens": 2048,
        "heads": 4,
        "dims": (32, 64, 128),
        "elements": 1 << 19,
    },
    "cuda": {
        "rows": 8192,
        "width": 2048,
        "sizes": (512, 1024, 2048, 4096),
        "tokens": 16384,
        "heads": 16,
        "dims": (64, 128),
        "elements": 1 << 26,
    },
}
"""`elements`: of an element-wise operation, as many as a chunk has of a layer's widest activation."""

TIERS, CALLS = ("host_write", "host_read", "disk_write", "disk_read"), ("attention_call", "attention_backward_call")

MOVED = 64 << 20
"""Bytes that go to a tier and back."""


def run(out: str | None, path: str, dtype: str | None) -> int:
    """Measure, print as it goes, write the profile. Exit code 0."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    chosen = getattr(torch, dtype) if dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    target = Path(out or "machine.json")
    for option, place in (("--out", target.parent), ("--path", Path(path))):
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise ConfigError(COMMAND_LINE, option, f"{place} is no directory that can be written to; make it, or name another")
    began = time.perf_counter()
    machine = calibrate(device, chosen, Path(path), say=lambda text: print(text, flush=True), name=name)
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

    found["made"] = measured("new memory, blocks of bytes", measure.made(device), 2**30, "GiB/s")
    flop = (1e12, "TFLOP/s") if device.type == "cuda" else (1e9, "GFLOP/s")
    found["products"] = measured("matrix products", measure.products(device, dtype, shape), *flop)
    if dtype.itemsize < 4 and device.type == "cpu":  # where the loss, whose sums are float32, has no product of 16 bits that gives them
        found["wide_products"] = measured("the same in float32", measure.products(device, torch.float32, shape), *flop)
    found["attention"] = measured("attention, head dim", measure.attention(device, dtype, shape, backward=False), *flop)
    found["attention_backward"] = measured("its backward pass", measure.attention(device, dtype, shape, backward=True), *flop)
    for key, backward in (("attention_call", False), ("attention_backward_call", True)):
        found[key] = tuple((dim, measure.attention_call(device, dtype, dim, backward=backward)) for dim in shape["dims"])
        say(f"{key}: " + ", ".join(f"{seconds * 1e6:.0f} us at {dim}" for dim, seconds in found[key]))
    found["mixers"] = measure.mixers(device, dtype, shape)
    for name, rate in found["mixers"]:
        say(f"{name}: {rate / flop[0]:,.3g} {flop[1]}")
    singles = {
        "moved": lambda: measure.elementwise(device, dtype, shape["elements"]),
        "optimizer": lambda: measure.adamw(device, shape["elements"]),
        "host_optimizer": lambda: measure.adamw(torch.device("cpu"), SHAPES["cpu"]["elements"]),
    }
    for key, call in singles.items():
        found[key] = call()
        say(f"{key}: {format_bytes(found[key])}/s")
    found["operations"] = measure.operations(device, dtype, shape, Rates(flops=inf, **dict.fromkeys(TIERS, inf), made=found["made"]))
    for name, rate in found["operations"]:
        say(f"{name}: {format_bytes(rate)}/s")
    for tier in ("host", "disk"):
        found[f"{tier}_write"], found[f"{tier}_read"] = through_tier(device, tier, path)
        say(f"{tier}: {format_bytes(found[f'{tier}_write'])}/s there, {format_bytes(found[f'{tier}_read'])}/s back")
    say(f"streamed steps in turn, {ROUNDS} rounds ...")
    with tempfile.TemporaryDirectory(dir=path) as directory:
        steps = Steps(device, dtype, shape["rows"], shape["width"], directory)
    found["launch"] = steps.launch(Rates(flops=inf, **dict.fromkeys(TIERS, inf), **{k: found[k] for k in CALLS}))
    say(f"launch: {found['launch'] * 1e6:.1f} us an operation")
    top = max(rate for _, rate in found["products"])
    found["handing_over"] = steps.handing_over(Rates(flops=top, **found))
    say(f"handing over: {found['handing_over'] * 1e6:.0f} us an extent")
    slower = steps.slower(Rates(flops=top, **found))
    found["slower"] = measured("all but products and mixers in a step, hidden states of bytes", slower, 1, "times as long")
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        found["link"] = gathered(device)
        say(f"all-gather: {format_bytes(found['link'])}/s received")
    source = f"longtrain calibrate, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
    return Machine(
        name=name, device=device.type, memory=memory_of(device), rates=Rates(flops=top, **found), peak_flops=top, source=source,
        dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip


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
