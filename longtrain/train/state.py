"""What a run is at one moment, as named tensors and plain facts: what a checkpoint holds, and how a run is put back into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longtrain.train.checkpoint import one_process, read_facts, read_tensors
from longtrain.train.optimizer import Optimizer


def state_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights in float32, AdamW's moments, and the buffers that the model saves (`model.*`). The live tensors.

    Of bfloat16 weights with masters only the masters are held: the others are their rounding. Frozen weights are not held: they are what
    the run began with (`frozen_sum`).
    """
    return optimizer.tensors() | {f"model.{name}": buffer for name, buffer in saved_buffers(model).items()}


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that are part of the model's state, and not made of its configuration (rotary frequencies)."""
    names = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


def frozen_sum(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """A checksum of the parameters that are not trained, of which a checkpoint holds nothing else; 0 without any. `dtype`: theirs."""
    return sum_of((p for p in model.parameters() if not p.requires_grad), dtype)


def sum_of(parameters: Iterable[Tensor], dtype: torch.dtype | None = None) -> int:
    """A checksum of parameters, in `dtype` or as they are."""
    total = 0
    for number, p in enumerate(parameters, start=1):
        p = p.detach().to(dtype if dtype and p.element_size() > 1 else p.dtype).contiguous()
        words = p.view({1: torch.uint8, 2: torch.int16}.get(p.element_size(), torch.int32))
        total += number * int(words.sum(dtype=torch.int64))
    return total % 2**63


def random_states() -> dict[str, Tensor]:
    """Copies of torch's generators, on the CPU and on the GPU in use."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def restore_state(checkpoint: Path, model: nn.Module, optimizer: Optimizer, group: dist.ProcessGroup | None = None) -> None:
    """Fill `model` and `optimizer` from a checkpoint and set the generators. Raises ValueError where the shapes are not this model's.

    `group`: of processes that each keep a part; how many wrote the checkpoint does not matter.
    """
    held, own, random = read_facts(checkpoint)["tensors"], state_tensors(model, optimizer), random_states()
    state = {name: shape for name, shape in held.items() if not name.startswith("random.")}
    for name in sorted(state.keys() | own.keys()):
        there, here = state.get(name), list(own[name].shape) if name in own else None
        if there != here:
            raise ValueError(f"{checkpoint} holds {name} as {there}, this model has {here}: it is a checkpoint of another model")
    random = {name: tensor for name, tensor in random.items() if name in held}
    read_tensors(checkpoint, {**own, **random}, group)
    optimizer.copy_to_model()
    torch.set_rng_state(random["random.cpu"])
    if "random.cuda" in random:
        torch.cuda.set_rng_state(random["random.cuda"])


def load_checkpoint_weights(model: nn.Module, checkpoint: Path) -> None:
    """Fill `model` with the float32 weights of a checkpoint. Raises ValueError where their names or shapes are others, or the weights
    beside them that are not trained."""
    facts = read_facts(checkpoint)
    shapes = facts["tensors"]
    if facts.get("frozen", 0) != frozen_sum(model):
        raise ValueError(f"{checkpoint} was written beside other frozen weights than the model section makes; make it describe those")
    stored = {n.removeprefix(p): n for p in ("weights.", "model.") for n in shapes if n.startswith(p)}
    own = {name: p for name, p in model.named_parameters() if p.requires_grad} | saved_buffers(model)
    for name in sorted(own.keys() | stored.keys()):
        theirs = shapes[stored[name]] if name in stored else "nothing"
        ours = list(own[name].shape) if name in own else "nothing"
        if theirs != ours:
            raise ValueError(f"{checkpoint} has {theirs} for {name}, where the model section makes {ours}; make it describe these weights")
    held = {key: torch.empty(shapes[key]) for key in stored.values()}
    with one_process():
        read_tensors(checkpoint, held)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(held[stored[name]])
