"""What a run is at one moment, as named tensors and plain facts: what a checkpoint holds, and how a run is put back into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from longtrain.train.checkpoint import read_facts, read_tensors
from longtrain.train.optimizer import Optimizer


def state_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights in float32, AdamW's moments, and what the model has besides (`model.*`: buffers, frozen parameters). The live tensors.

    Of bfloat16 weights with masters only the masters are held: the others are their rounding.
    """
    trained = set(optimizer.names)
    rest = {f"model.{n}": t for n, t in (*model.named_parameters(), *model.named_buffers()) if n not in trained}
    return optimizer.tensors() | {name: tensor.detach() for name, tensor in rest.items()}


def random_states() -> dict[str, Tensor]:
    """Copies of torch's generators, on the CPU and on the GPU in use."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def restore_state(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Fill `model` and `optimizer` from a checkpoint and set the generators. Raises ValueError where the shapes are not this model's."""
    held, own, random = read_facts(checkpoint)["tensors"], state_tensors(model, optimizer), random_states()
    state = {name: shape for name, shape in held.items() if not name.startswith("random.")}
    for name in sorted(state.keys() | own.keys()):
        there, here = state.get(name), list(own[name].shape) if name in own else None
        if there != here:
            raise ValueError(f"{checkpoint} holds {name} as {there}, this model has {here}: it is a checkpoint of another model")
    random = {name: tensor for name, tensor in random.items() if name in held}
    read_tensors(checkpoint, {**own, **random})
    optimizer.copy_to_model()
    torch.set_rng_state(random["random.cpu"])
    if "random.cuda" in random:
        torch.cuda.set_rng_state(random["random.cuda"])
