"""`longtrain plan`: what fits a budget, how long it takes, what it holds and writes, and what would have to change where nothing fits.

    longtrain plan CONFIG [section.key=value ...]
    longtrain plan llama3-8b --seq-len 1048576 --budget 76GiB --device h100 --host 128GiB --disk 2TB
    longtrain plan path/to/config.json --seq-len 131072 --device h100 --gpus 8 --out out/plan
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from longtrain.config import Config, ConfigError, load_config
from longtrain.config.hf import HfModelConfig
from longtrain.files import said_plainly, write_whole
from longtrain.offload import DiskSettings
from longtrain.plan import Offload, Plan
from longtrain.planner import explain, picture
from longtrain.planner.asked import held_beside_model
from longtrain.planner.axes import Axes
from longtrain.planner.explore import Wanted, by_hand, explore, lacks, longest_tokens, pareto, refusal
from longtrain.planner.footprint import ModelFootprint, measure_model
from longtrain.planner.machines import Machine, find_machine, memory_of
from longtrain.planner.rates import usual_rates
from longtrain.planner.shapes import SHAPES, find_shape, on_meta
from longtrain.train.budget import footprint_of
from longtrain.train.schedule import step_count
from longtrain.units import format_bytes, parse_bytes

STAGING = 2 << 30
"""Of a GPU, where no config says otherwise."""


def run(args: argparse.Namespace) -> int:
    """Print the plans. Exit code 0; 1 where nothing fits; 2 for a command line that is wrong. Raises ConfigError for settings that are."""
    try:
        wanted, title, plan, axes = read(args)
        return show(wanted, args, title, plan, axes)
    except ConfigError:
        raise
    except ValueError as error:
        print(f"longtrain plan: {error}", file=sys.stderr)
        return 2


def read(args: argparse.Namespace) -> tuple[Wanted, str, Plan | None, Axes]:
    """What is asked for, what it is called, and, where it is made by hand, the plan and the devices that it is for."""
    for name in ("seq_len", "gpus"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: must be at least 1, found {getattr(args, name)}")
    if min(args.batch) < 1:
        raise ValueError(f"--batch: must be at least 1, found {min(args.batch)}")
    shape = find_shape(args.config)
    machine = find_machine(args.device) if args.device else None
    if shape is None and not Path(args.config).is_file():
        found = "holds no config.json" if Path(args.config).is_dir() else f"is no file (from {Path.cwd()})"
        raise ValueError(f"{args.config} {found}, and no shape that is known ({', '.join(SHAPES)}); name a run's YAML file or one of these")
    if shape is None:
        return read_config(args, machine)
    if args.overrides:
        raise ValueError(
            f"{args.overrides[0]}: settings are of a YAML file, and {args.config} is none; use the options (longtrain plan --help)"
        )
    if args.seq_len is None:
        raise ValueError("--seq-len is missing: say how many tokens a sequence has")
    machine, model = machine or find_machine("h100"), measure_model(on_meta(shape, torch.bfloat16))
    return wanted_for(args, machine, model, args.seq_len, Offload(staging_bytes=STAGING), None, masters=True), args.config, None, Axes()


def read_config(args: argparse.Namespace, machine: Machine | None) -> tuple[Wanted, str, Plan | None, Axes]:
    overrides = list(args.overrides)
    if args.seq_len is not None:
        overrides += [f"data.seq_len={args.seq_len}", f"train.length_schedule=[{{from_step: 0, seq_len: {args.seq_len}}}]"]
    overrides += [f"memory.budget={args.budget}"] if args.budget else []
    config, where = load_config(args.config, overrides)
    settings = config.memory.plan_settings()
    if not settings and not (args.budget or config.memory.budget or machine):
        raise where.error("memory", "neither memory.budget nor memory.chunk_tokens is set, so nothing is streamed; set one of them")
    here = machine is None and (config.train.device != "cuda" or torch.cuda.is_available())
    if machine is None:
        machine = this_machine() if here else find_machine("h100")
    if isinstance(config.model, HfModelConfig):
        print(f"  building {config.model.hf} with random weights, to see what its layers cost", file=sys.stderr, flush=True)
    model = footprint_of(config, where)
    for option, given in (("--gpus", (args.gpus or 1) > 1), ("--batch", args.batch != [1])):
        if settings and given:
            raise ValueError(f"{option} is for plans that are looked for, and memory.chunk_tokens makes one by hand; leave one of them out")
    places = (config.memory.optimizer,) if settings or config.memory.optimizer == "host" else None
    wanted = wanted_for(
        args, machine, model, config.data.seq_len, config.memory.tiers() or Offload(), config.memory.budget,
        masters=config.train.dtype == "bfloat16", steps=step_count(config), places=places,
    )  # fmt: skip
    if config.memory.optimizer == "host" and not args.host:  # --host is all that there is, memory.host_budget what is left for tiers
        wanted = replace(wanted, host=wanted.host + model.optimizer + 4 * model.trained)
    if settings:
        wanted = replace(wanted, devices=axes_of(config).devices)
    if here:
        taken = held_beside_model(model)
        wanted = replace(wanted, room=wanted.room - taken, taken=taken)
    return wanted, Path(args.config).stem, Plan(**settings) if settings else None, axes_of(config)


def axes_of(config: Config) -> Axes:
    """The devices that share weights by the section `parallel`; a number that is `null` counts as 1."""
    parallel = config.parallel
    return Axes(sequence=(parallel.cp_ring or 1) * (parallel.cp_ulysses or 1), replicas=parallel.dp_shard or 1)


def wanted_for(
    args: argparse.Namespace, machine: Machine, model: ModelFootprint, tokens: int, tiers: Offload, budget: str | None, *, masters: bool,
    steps: int = 1, places: tuple[str, ...] | None = None,
) -> Wanted:  # fmt: skip
    asked, host, disk = args.budget or budget, tiers.host_bytes, tiers.disk
    room = parse_bytes(asked, "--budget") if asked else int(0.95 * machine.memory)
    if machine.device == "cuda" and room > machine.memory:
        raise ValueError(f"--budget: {asked} is more than the {format_bytes(machine.memory)} of {machine.name}")
    if args.host:
        host = parse_bytes(args.host, "--host")
    if args.disk:
        disk = replace(disk or DiskSettings(path="/scratch", budget=1), budget=parse_bytes(args.disk, "--disk"))
    places = places or (("device", "host") if machine.device == "cuda" and host else ("device",))
    return Wanted(
        model=replace(model, device=torch.device(machine.device)), tokens=tokens, batches=tuple(args.batch), machine=machine,
        devices=args.gpus or 1, room=room, taken=0, host=host, disk=disk, staging=tiers.staging_bytes, steps=steps, masters=masters,
        places=places,
    )  # fmt: skip


def this_machine() -> Machine:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = usual_rates(device)
    top = max((rate for _, rate in rates.products), default=rates.flops)
    return Machine(
        name="this machine", device=device.type, memory=memory_of(device), rates=rates, peak_flops=top,
        source="usual figures; longtrain calibrate",
    )  # fmt: skip


def show(wanted: Wanted, args: argparse.Namespace, title: str, plan: Plan | None, axes: Axes = Axes()) -> int:
    if args.out:
        with said_plainly(Path(args.out)):
            Path(args.out).mkdir(parents=True, exist_ok=True)
    machine, several = wanted.machine, f"{wanted.devices} x " if wanted.devices > 1 else ""
    print(
        f"{title}: {wanted.tokens:,} tokens on {several}{machine.name}, {format_bytes(wanted.room + wanted.taken)} each ({machine.source})"
    )
    say = lambda text: print(f"  looking: {text}", file=sys.stderr, flush=True)
    found = [by_hand(wanted, plan, axes)] if plan else explore(wanted, say=say)
    if not found:
        print(f"nothing fits. {refusal(wanted)}")
        return 1
    best = found[0]
    for part in (explain.table, explain.memory, explain.time, explain.formulas):
        print("", *part(found if part is explain.table else best, wanted), sep="\n")
    if plan and (why := lacks(wanted, best)):
        print(f"\nthis plan does not fit: {why}; memory.budget in place of memory.chunk_tokens has one looked for that does")
        return 1
    front = [best]
    if not (args.quick or plan):
        front = pareto(wanted, best)
        print("", *explain.front(front, wanted), sep="\n")
        print(f"\nlongest sequence in {format_bytes(wanted.room + wanted.taken)}: {longest_tokens(wanted):,} tokens")
    if args.out:
        directory = Path(args.out)
        write_whole(directory / "plan.yaml", lambda path: path.write_text(explain.as_yaml(best, wanted, title), encoding="utf-8"))
        written = ["plan.yaml", *picture.write(directory, title, found, front, wanted)]
        print(f"{directory} holds {', '.join(written)}; longtrain train takes the settings of plan.yaml")
    return 0
