"""Which part of a layer that failed its proof looks across tokens, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ROW_WISE = "use row-wise scaling, one scale a token, with weight gradients in high precision (longtrain.nn.FP8Linear)"


def part_that_looks_across(
    layer: nn.Module, x: Tensor, arguments: dict[str, Any], differs: Callable[[nn.Module, Tensor], str]
) -> str:
    """Name, class and remedy of the innermost module in `layer` of which ``differs(module, its input)`` tells what; "" where of none.

    Looked at are modules that turn one tensor ``[B, T, ...]`` into another.
    """
    calls: dict[str, tuple[nn.Module, Tensor]] = {}

    def note(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], y: Any) -> None:
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(y, Tensor)
        if alone and args[0].ndim == 3 and y.ndim == 3 and args[0].shape[1] == y.shape[1] == x.shape[1]:
            calls.setdefault(name, (module, args[0].detach()))

    handles = [
        module.register_forward_hook(lambda *call, name=name: note(name, *call), with_kwargs=True) for name, module in layer.named_modules() if name
    ]
    try:
        with torch.no_grad():
            layer.forward(x, **arguments)
    finally:
        for handle in handles:
            handle.remove()
    for name, (module, given) in calls.items():  # in the order in which they were done: those inside of others first
        if what := differs(module, given):
            scaled = f", as in 8-bit products with tensor-wise scaling: {ROW_WISE}" if is_linear(module) else ""
            return f"; {name} ({type(module).__name__}) does, by its {what}{scaled}"
    return ""


def what_changed(layer: nn.Module, before: dict[str, Tensor]) -> str:
    """The first of the layer's buffers that is not as `before`, by name, with the remedy; "" where all are."""
    for name, buffer in layer.named_buffers():
        if not torch.equal(buffer, before[name]):
            owner = layer.get_submodule(name.rpartition(".")[0])
            scaled = f", as in 8-bit products with delayed scaling, whose scales come from earlier calls: {ROW_WISE}" if is_linear(owner) else ""
            return f"{name} of {type(owner).__name__}{scaled}"
    return ""


def is_linear(module: nn.Module) -> bool:
    """Whether it is built like a linear layer: a matrix of its own, and nothing else that has parameters."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not any(True for _ in module.children())
