"""`longtrain verify --nproc P CONFIG`: do P processes that share sequences, weights and batch compute what one does? In float64.

The config's model shrunk as for `longtrain verify`, on gloo processes of this machine: every way of laying P processes out as rings of
groups that exchange heads, in every arrangement of tokens; weights sharded by FSDP2 as a run shards them, tensors in the config's tiers and
blocks. Each process begins with the same weights; losses and gathered gradients are held against plain autograd's of the whole.
"""

from __future__ import annotations

import copy
import faulthandler
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from longtrain.apply import apply
from longtrain.commands.verify import FLOAT64_BOUND, Row, compared, limits_of, shrink, shrink_plan, shrink_transformers, throughout
from longtrain.config import Config, Locations, load_config
from longtrain.config.hf import HfModelConfig
from longtrain.config.parallel import DIMENSIONS, ParallelConfig
from longtrain.nn import LanguageModel
from longtrain.parallel.layout import ARRANGEMENTS
from longtrain.parallel.mesh import DIMS
from longtrain.parallel.settings import Parallel
from longtrain.plan import Plan
from longtrain.span import Layout
from longtrain.train.distribute import Work, shard

SECONDS = 600
"""A process that takes longer prints where it is and exits."""


def run(config_path: str, overrides: Sequence[str], processes: int) -> int:
    """Print the table and the verdict; 0 when everything holds, 1 otherwise."""
    config, where = load_config(config_path, overrides)
    if processes < 1:
        raise where.error("parallel", f"--nproc must be at least 1, found {processes}")
    _small_model(config, where)  # what is wrong with it is said once
    with tempfile.TemporaryDirectory() as directory:
        meeting = Path(directory) / "ranks"
        try:
            mp.spawn(_process, (processes, meeting.as_uri(), config_path, overrides), nprocs=processes)
        except mp.ProcessExitedException as error:
            return error.exit_code or 1
    return 0


def _process(rank: int, size: int, meeting: str, config_path: str, overrides: Sequence[str]) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS))
    config, where = load_config(config_path, overrides)
    model, plan, tokens, said = _small_model(config, where)
    failed = 0
    if rank == 0:
        print(f"{config_path}: {config.data.seq_len} tokens shrink to {tokens}, chunks to {plan.chunk_tokens}, on {size} processes")
        print(f"model: {said}\n")
    for row in check(model, plan, tokens, config.parallel, size):
        failed += not row.good
        if rank == 0:
            print(f"{'ok  ' if row.good else 'FAIL'}  {row.check:70}  {row.value:>32}  {row.bound}", flush=True)
    if rank == 0:
        print(f"\n{'exact' if not failed else f'NOT EXACT: {failed} checks failed'}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    if failed:
        raise SystemExit(1)


def _small_model(config: Config, where: Locations) -> tuple[nn.Module, Plan, int, str]:
    """The config's model shrunk, its plan, so many tokens, and what it is."""
    plan, tokens = shrink_plan(config, where)
    torch.manual_seed(0)
    hf = isinstance(config.model, HfModelConfig)
    model, plan, said = shrink_transformers(config, plan, tokens, where) if hf else shrink(config, plan, tokens)
    return model, plan, tokens, said


def check(model: nn.Module, plan: Plan, tokens: int, config: ParallelConfig, size: int) -> Iterator[Row]:
    """The rows for a small float64 model, one by one; on every process the same."""
    own = isinstance(model, LanguageModel)
    shape = model.config if own else model.config.get_text_config()
    ids = torch.randint(shape.vocab_size, (1, tokens))
    labels = ids.clone()
    labels[:, : tokens // 5] = -100
    edges = (0, tokens // 4 + 1, tokens // 4 + 2, tokens)
    inputs = {"input_ids": ids, "labels": labels, **({} if own else {"use_cache": False})}
    packed = {"cu_seqlens": torch.tensor(edges, dtype=torch.int32)} if own else {"position_ids": Layout(tokens, edges).positions()[None]}
    cases = {"one document": inputs, "three documents": {**inputs, **packed}}
    exact = {name: _step(copy.deepcopy(model), case) for name, case in cases.items()}
    layouts = [config.layout, *(name for name in ARRANGEMENTS if name != config.layout)]
    limits = {name: limits_of(copy.deepcopy(model), cases[name], step) for name, step in exact.items()}
    most = shape.num_heads if own else getattr(shape, "num_attention_heads", 1)
    for heads in (n for n in range(1, size + 1) if size % n == 0 and n <= most):
        mesh = init_device_mesh("cpu", (1, 1, size // heads, heads), mesh_dim_names=DIMENSIONS)
        work = Work(mesh=mesh, context=size)
        way = "auto" if config.way in (("heads",) if heads < size else ("ring", "queries")) else config.way  # what cannot be here
        others = _other_settings(config, size, heads)
        said = "".join(f", {name} {value}" for name, value in others.items() if value not in ("auto", None))
        for number, layout in enumerate(layouts):
            name, case = list(cases.items())[number % len(cases)]
            ours = copy.deepcopy(model)
            shard(ours, work, plan.segment_layers, torch.float64)
            done = f"rings of {size // heads} x {heads} that exchange heads, {way}{said}, {layout}, {name}"
            try:
                report = apply(ours, plan, group=mesh[DIMS], parallel=Parallel(layout=layout, way=way, stripe=2, **others))
                try:
                    report.check_replay()
                    found = _step(ours, case)
                finally:
                    report.undo()
            except ValueError as refusal:  # by all processes, in the same words
                yield Row(done, str(refusal), f"<= {FLOAT64_BOUND:.0e}", False)
                return
            yield compared(done, found, exact[name], limits[name])


def _other_settings(config: ParallelConfig, size: int, heads: int) -> dict[str, Any]:
    """The config's for what is no attention, and for links; without what `size` processes of which `heads` exchange heads cannot be."""
    machines = config.machine is not None and size % config.machine == 0 and config.machine % heads == 0
    states = "auto" if heads == 1 and config.states == "heads" else config.states
    return dict(conv=config.conv, states=states, machine=config.machine if machines else None)


def _step(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)  # the same dropout
    with throughout(model):
        loss = model(**inputs).loss
        loss.backward()
    whole = lambda grad: grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return {"loss": loss.detach(), **{name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}}
