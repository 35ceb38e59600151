"""How the processes of a run share its work: which sequences each reads, which tokens of them, and which part of the parameters it keeps.

Ranks are a mesh (`longtrain.config.parallel.DIMENSIONS`). Those that differ in the first two read other sequences; those that differ in
the last two only, other tokens of the same ones. Gradients are averaged over all, so a loss counts `data` times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from longtrain.config import Config, Locations
from longtrain.config.parallel import DIMENSIONS
from longtrain.parallel.mesh import DIMS, patience
from longtrain.parallel.settings import Parallel
from longtrain.parallel.spread import Sharing
from longtrain.span import Span
from longtrain.train.processes import ALONE, Processes

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Work:
    """This process's share: of `data` groups that read other sequences it is in number `place`; `context` ranks share each sequence."""

    processes: Processes = ALONE
    mesh: DeviceMesh | None = None
    kept: int = 1
    """Processes that each keep a part of the parameters."""
    data: int = 1
    place: int = 0
    context: int = 1
    spread: Parallel = Parallel()
    """How they spread it."""
    sharing: Sharing | None = None
    """Those that share each sequence, once the model is streamed."""

    def of_sequences(self, sequences: Sequence[T]) -> list[T]:
        """Those that this process's group reads."""
        return list(islice(sequences, self.place, None, self.data))

    def held(self, seq_len: int) -> tuple[Span, ...] | None:
        """What this process holds of a sequence; None: all of it."""
        return None if self.sharing is None else self.sharing.shards(seq_len).spans(self.sharing.mesh.all.rank)

    def join(self, part: Tensor) -> Tensor:
        """Summed over the processes that share a sequence."""
        return part if self.sharing is None else self.sharing.mesh.all.sum(part)

    def total(self, *parts: float) -> list[float]:
        """Sums over all processes, each of which has its own part."""
        return self.processes.sum(parts)

    def total_of_groups(self, *parts: float) -> list[float]:
        """Sums over groups, of numbers that all processes that share a sequence have."""
        return [total / self.context for total in self.processes.sum(parts)]


def make_work(config: Config, where: Locations, processes: Processes) -> Work:
    """Raises ConfigError where the processes do not fit the config, or the config cannot be shared by them."""
    try:
        sizes = config.parallel.sizes(processes.size)
    except ValueError as error:
        raise where.explain(error, "parallel") from None
    if processes.size == 1:
        return Work(processes)
    replicate, shard, ring, heads = sizes
    data, context = replicate * shard, ring * heads
    for stage in config.stages():
        sequences = stage.tokens_per_update // stage.seq_len
        if sequences % data:
            raise where.error(
                "train.tokens_per_update",
                f"{sequences} sequences of {stage.seq_len} tokens an update cannot be shared by {data} groups; give a multiple of "
                f"{data * stage.seq_len} tokens, or lower parallel.dp_shard and dp_replicate",
            )
        shortest = min(stage.seq_len, config.memory.chunk_tokens or stage.seq_len)
        if shortest < context:
            name = "memory.chunk_tokens" if shortest < stage.seq_len else "data.seq_len"
            raise where.error(name, f"{shortest} tokens cannot be spread over {context} processes; give at least {context}")
    mesh = make_mesh(choose_device(config, where, processes).type, sizes, DIMENSIONS)
    return Work(processes, mesh, shard * context, data, processes.rank // context, context, config.parallel.sharing())


def make_mesh(device_type: str, sizes: Sequence[int], names: Sequence[str]) -> DeviceMesh:
    """A mesh of all processes, in whose groups a rank waits for others as long as in the group of all."""
    mesh = init_device_mesh(device_type, tuple(sizes), mesh_dim_names=tuple(names))
    for group in mesh.get_all_groups():
        _set_pg_timeout(patience(dist.group.WORLD), group)
    return mesh


def choose_device(config: Config, where: Locations, processes: Processes = ALONE) -> torch.device:
    """Of several processes on a machine with GPUs, each has its own. Raises ConfigError."""
    count = torch.cuda.device_count()
    if config.train.device == "cpu" or (config.train.device == "auto" and not count):
        return torch.device("cpu")
    if not count:
        raise where.error("train.device", "no GPU is visible to PyTorch; set auto or cpu, or install a CUDA build of torch")
    if processes.size == 1:
        return torch.device("cuda")
    if processes.local >= count:
        found = f"process {processes.local + 1} of this machine has no GPU: {count} are visible"
        raise where.error("train.device", f"{found}; start {count}, or set cpu")
    torch.cuda.set_device(processes.local)
    return torch.device("cuda", processes.local)


def shard(model: nn.Module, work: Work, segment_layers: int, dtype: torch.dtype) -> None:
    """Have each process keep a part of the parameters, as they are; a segment of layers is gathered at a time, in `dtype`.

    Of a model with adapters the root is the transformers model inside of peft's, which `lt.apply` runs by itself.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    sizes, names = (work.mesh.size(0), work.mesh.size() // work.mesh.size(0)), ("dp_replicate", "kept")
    first = 0 if sizes[0] > 1 else 1
    mesh = make_mesh(work.mesh.device_type, sizes[first:], names[first:])
    low = dtype == torch.bfloat16
    policy = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False) if low else MixedPrecisionPolicy()
    )
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = list(max(lists, key=lambda found: sum(p.numel() for p in found.parameters())))
    for at in range(0, len(layers), segment_layers):
        unit = layers[at : at + segment_layers]
        fully_shard(unit if len(unit) > 1 else unit[0], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if mesh.device_type == "cpu":
        for module in model.modules():
            if hasattr(module, "set_force_sum_reduction_for_comms"):
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no average


def sequence_group(work: Work) -> DeviceMesh | None:
    """Those that share each sequence with this process."""
    return None if work.context == 1 else work.mesh[DIMS]
