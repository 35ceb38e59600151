"""One sequence shared by several processes of one thread each, against as many processes with a sequence of their own, in the same run.

    python tools/bench_parallel.py --seq-len 32768 --chunk 2048
    python tools/bench_parallel.py --seq-len 8192 --chunk 1024 --ways ring queries --link 200MB --trace out/lanes.json
    python tools/bench_parallel.py --seq-len 8192 --chunk 1024 --ways states scan --kinds linear delta conv --conv-taps 64

Throughput: tokens a second of all processes together, by wall clock, medians of `--repeats` rounds after one to warm up, ways and
independent processes in turn; by processor time as well, which a busy machine changes less. Bytes: received by a rank in a step, counted
at the calls, beside the formulas of longtrain.parallel.cost and cost_mixers; of all ranks together beside what the loopback interface
counted in the same steps (which is all that passes over it, whoever sends it). `--link`: nothing arrives sooner than over a link of so many
bytes a second; "hidden" is then the share of the transfers that nobody waited for, and once more without the time in which the other
process was not yet as far (on a busy machine, much of it). `--kinds`: what mixes the tokens in the layers, such as `delta attention`, for
the ways `states` and `scan`. `--trace`: what was under way and what was waited for, a lane each for every process, as Chrome and Perfetto
show them.

Behind the table: which way `lt.Parallel()` takes, and what each would send. And the last round's steps played again
(`longtrain.parallel.timeline`) over links on which the transfers take 5% to 80% of the processor's seconds: the share of the transfers by
which the step is not longer than over an endlessly fast link, and what is waited for. Other work on the machine does not enter into it.

No number is printed unless loss and gradients of every way agree with those of one process.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import longtrain as lt
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.nn.config import LayerKind
from longtrain.parallel.timeline import Posted, play
from longtrain.units import parse_bytes

WAYS = {
    "heads": dict(way="heads"),
    "ring": dict(heads=1, way="ring", layout="zigzag"),
    "queries": dict(heads=1, way="queries", layout="striped"),
    "halo": dict(heads=1, way="halo", layout="contiguous"),
    "states": dict(states="heads", conv="channels"),
    "scan": dict(states="scan", conv="halo", layout="contiguous"),
    "double ring": dict(heads=1, way="ring", layout="zigzag", machine=2),
}
DEFAULTS = {
    "seq-len": 32768, "chunk": 2048, "processes": 2, "repeats": 3, "layers": 2, "hidden": 256, "ffn": 512, "vocab": 256, "heads": 4,
    "kv-heads": 2,
}
CLOSE = 2e-4
"""Largest relative difference of a parameter's gradient in float32; a wrong one is of order one."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--window", type=int, default=None, help="tokens that a query sees; needed for halo")
    parser.add_argument("--kinds", nargs="+", choices=get_args(LayerKind), default=None, help="attention by default")
    parser.add_argument("--conv-taps", type=int, default=128)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["heads", "ring", "queries"])
    parser.add_argument("--link", type=parse_bytes, default=None, help="bytes a second, such as 200MB")
    parser.add_argument("--trace", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/bench_parallel.json"))
    a = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(work, (a, Path(directory)), nprocs=a.processes)
        rows, said = json.loads((Path(directory) / "rows.json").read_text())
        lanes = [event for rank in range(a.processes) for event in json.loads((Path(directory) / f"lanes{rank}.json").read_text())]
    print(f"{a.seq_len} tokens, chunks of {a.chunk}, {a.processes} processes of one thread; medians of {a.repeats}")
    for row in rows:
        print("  ".join(f"{key} {value:,.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    print(said)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python tools/bench_parallel.py", *(sys.argv[1:] if argv is None else argv)])
    a.out.write_text(json.dumps({"command": command, "torch": torch.__version__, "rows": rows, "said": said.splitlines()}, indent=1) + "\n")
    if a.trace is not None:
        a.trace.parent.mkdir(parents=True, exist_ok=True)
        a.trace.write_text(json.dumps(lanes))
    return 0


def work(rank: int, a: argparse.Namespace, directory: Path) -> None:
    torch.set_num_threads(1)
    meeting = (directory / "ranks").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=a.processes, timeout=timedelta(seconds=600))
    torch.manual_seed(0)
    window = None if a.window is None else (a.window,)
    kinds = {} if a.kinds is None else {"layers": tuple(a.kinds)}
    kinds |= {"conv_taps": a.conv_taps} if "conv" in (a.kinds or ()) else {}
    config = ModelConfig(vocab_size=a.vocab, num_layers=a.layers, hidden_size=a.hidden, intermediate_size=a.ffn, num_heads=a.heads,
                         num_kv_heads=a.kv_heads, window=window, initializer_range=0.1, **kinds)
    model = LanguageModel(config)
    ids = torch.randint(a.vocab, (1, a.seq_len), generator=torch.Generator().manual_seed(1))
    plan, runs, reports = lt.Plan(chunk_tokens=a.chunk), {}, {}
    for name in ("independent", *a.ways):
        runs[name] = copy.deepcopy(model)
        reports[name] = lt.apply(runs[name], plan, parallel=None if name == "independent" else lt.Parallel(**WAYS[name]))
        check(runs, name, ids)
    for name in a.ways:
        reports[name].sharing.mesh.all.traffic.link = a.link
    seconds, lanes, over_loopback = {name: [] for name in runs}, [], {name: [] for name in runs}
    for _ in range(a.repeats):
        for name in runs:
            if name != "independent":
                traffic = reports[name].sharing.mesh.all.traffic
                traffic.lanes, traffic.log = [], []
            before = loopback_bytes()
            seconds[name].append(step(runs[name], ids))
            over_loopback[name].append(loopback_bytes() - before)
    rows = []
    medians = {name: [statistics.median(measured) for measured in zip(*of_way, strict=True)] for name, of_way in seconds.items()}
    alone, alone_busy = medians["independent"]
    for name, (time_of_step, busy) in medians.items():
        shared = name != "independent"
        tokens = a.seq_len * (1 if shared else a.processes)
        row = {"way": name, "seconds": time_of_step, "processor seconds": busy, "tokens a second": tokens / time_of_step}
        if shared:
            row |= {"of independent": alone / (a.processes * time_of_step), "by processor time": alone_busy / (a.processes * busy)}
            row |= {**bytes_of(reports[name], a), "MB over loopback": min(over_loopback[name]) / 1e6, **waiting(reports[name])}
            lanes += events(name, rank, reports[name].sharing.mesh.all.traffic.lanes)
        rows.append(row)
    said = "\n".join([said_of_choices(model, plan, reports, a), said_of_links(reports, a)])
    if rank == 0:
        (directory / "rows.json").write_text(json.dumps((rows, said)))
    (directory / f"lanes{rank}.json").write_text(json.dumps(lanes))
    dist.barrier()
    dist.destroy_process_group()


def step(model: LanguageModel, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds until the last process is done, and the processor's seconds of the busiest: barriers and waiting not counted."""
    model.zero_grad()
    dist.barrier()
    started, busy = time.perf_counter(), time.process_time()
    model(ids, labels=ids).loss.backward()
    busy = torch.tensor(time.process_time() - busy)
    dist.barrier()
    seconds = time.perf_counter() - started
    dist.all_reduce(busy, op=dist.ReduceOp.MAX)
    return seconds, float(busy)


def check(runs: dict, name: str, ids: torch.Tensor) -> None:
    step(runs[name], ids)
    if name == "independent":
        return
    for (which, p), own in zip(runs[name].named_parameters(), runs["independent"].parameters(), strict=True):
        grad = p.grad / dist.get_world_size()  # each process's part, once for every process
        dist.all_reduce(grad)
        error = float((grad - own.grad).norm() / own.grad.norm())
        if not error <= CLOSE:
            raise SystemExit(f"{name}: the gradient of {which} differs from that of one process by {error:.1e}; no speed is reported")


def loopback_bytes() -> int:
    """Received over the loopback interface since the machine started (Linux)."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    raise SystemExit("/proc/net/dev has no interface lo")


def bytes_of(report: lt.Report, a: argparse.Namespace) -> dict:
    """Received by this rank and by all in a step, and by formula (a mean over ranks)."""
    sharing, lanes = report.sharing, report.sharing.mesh.all.traffic.lanes
    shards, counted = sharing.shards(a.seq_len), sum(lane.nbytes for lane in lanes)
    choices = [sharing.choice(shape, shards) for of_layer in sharing.shapes for shape in of_layer]
    formula = sum(choice.costs[choice.way].total for choice in choices)
    of_all = sharing.mesh.all.sum(torch.tensor(counted))
    return {"MB received": counted / 1e6, "by formula": formula / 1e6, "MB received by all": int(of_all) / 1e6}


def waiting(report: lt.Report) -> dict:
    traffic = report.sharing.mesh.all.traffic
    waited = sum(lane.done - lane.asked for lane in traffic.lanes)
    if traffic.link is None:
        return {"waited seconds": waited}
    transfers, of_link = sum(lane.nbytes for lane in traffic.lanes) / traffic.link, sum(lane.of_link for lane in traffic.lanes)
    return {
        "waited seconds": waited, "transfer seconds": transfers, "hidden": max(0.0, 1 - waited / transfers),
        "hidden but for waiting for the peer": 1 - of_link / transfers,
    }


def said_of_choices(model: LanguageModel, plan: lt.Plan, reports: dict, a: argparse.Namespace) -> str:
    """The way that `lt.Parallel()` takes, and every way's bytes by formula. Every process calls it."""
    chosen = lt.apply(copy.deepcopy(model), plan, parallel=lt.Parallel()).sharing
    lines = ["chosen by lt.Parallel(), with what a rank receives in a layer (forward + backward):"]
    lines += [chosen.explain(a.seq_len), "and if asked for:"]
    for name in a.ways:
        _, *of_layers = reports[name].sharing.explain(a.seq_len).splitlines()
        lines += [f"{name}: {said}" for said in of_layers]
    return "\n".join(lines)


def said_of_links(reports: dict, a: argparse.Namespace) -> str:
    lines = ["the last step played again over slower links: hidden (and what was waited for, as shares of the transfers)"]
    for name in a.ways:
        logs: list = [None] * a.processes
        dist.all_gather_object(logs, reports[name].sharing.mesh.all.traffic.log)
        at_once = play(logs, math.inf)
        nbytes = sum(sum(event.received.values()) for log in logs for event in log if isinstance(event, Posted)) / a.processes
        computed = max(log[-1].computed - log[0].computed for log in logs)
        for share in (0.05, 0.1, 0.2, 0.4, 0.8):
            link = nbytes / (share * computed)
            played = play(logs, link)
            later = max(rank.seconds for rank in played) - max(rank.seconds for rank in at_once)
            waited = sum((rank.waited for rank in played), Counter())
            waited.subtract(sum((rank.waited for rank in at_once), Counter()))
            what = ", ".join(f"{what} {seconds / a.processes / (share * computed):.1%}" for what, seconds in waited.most_common(4))
            hidden = 1 - later / (share * computed)
            lines.append(f"{name:8} {link / 1e6:8,.0f} MB a second, {share:4.0%} of the computing: {hidden:6.1%}  ({what})")
    return "\n".join(lines)


def events(name: str, rank: int, lanes) -> list[dict]:
    found = []
    for lane in lanes:
        for thread, label, start in (("under way", lane.what, lane.started), ("waiting", f"for {lane.what}", lane.asked)):
            found.append({"ph": "X", "pid": f"{name}, process {rank}", "tid": thread, "name": label, "ts": start * 1e6,
                          "dur": (lane.done - start) * 1e6, "args": {"bytes": lane.nbytes}})
    return found


if __name__ == "__main__":
    raise SystemExit(main())
