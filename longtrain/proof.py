"""The proof that a layer is what it says, on a tiny input: run whole and in chunks, output and gradients agree. Where they do not, the part
of the layer that is to blame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from longtrain.offload import DeviceStore
from longtrain.plan import Plan
from longtrain.sharded import plain_copy, whole
from longtrain.stream.segment import Chain, Segment

PROOF_TOKENS = 13
PROOF_CHUNK = 5
PROOF_BOUND = 1e-5
"""Relative norm in float64. Layers that upcast to float32 inside stop at 1e-7; one that leaks between tokens is off by far more."""

CHANGES = "it changes its buffers in forward, and a streamed layer runs several times"
ROW_WISE = "use row-wise scaling, one scale a token, with weight gradients in high precision (longtrain.nn.FP8Linear)"


def prove(layer: nn.Module, model: nn.Module | None = None) -> str | None:
    """Why a layer is not what its protocol says, or None: run whole and in chunks on its own tiny example, output and gradients agree.

    A copy in float64 is run, so that the bound holds whatever the training dtype; the layer itself and the generator stay untouched. A
    layer that is sharded is gathered for the copy, in the `model` that it is part of.
    """
    devices = {p.device for p in layer.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        try:
            with whole(layer, layer if model is None else model):
                copied = layer.copy_in_float64() if hasattr(layer, "copy_in_float64") else plain_copy(layer).double().eval()
            own = copied.difference_from_eager() if hasattr(copied, "difference_from_eager") else None
            example = lambda: tree_map(_as_double, copied.example(PROOF_TOKENS))
            return own or _difference_in_chunks(copied, *example()) or _difference_in_training(copied, *example())
        except Exception as error:  # whatever it is, it is the reason: reported by name, never dropped
            return f"{type(error).__name__}: {error}{_quantised(layer)}"


def _as_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _difference_in_chunks(layer: nn.Module, x: Tensor, arguments: dict[str, Any]) -> str | None:
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    whole = _outcome(layer, layer.forward, x, arguments)
    if changed := _what_changed(layer, buffers):
        return f"{CHANGES}: {changed}"
    if whole[0].shape != x.shape:
        return f"it turns {list(x.shape)} into {list(whole[0].shape)}, and hidden states must keep their shape"
    what, error = _difference(whole, _outcome(layer, _in_chunks(layer), x, arguments))
    return f"{_differs(what, error)}{_part_that_looks_across(layer, x, arguments)}" if what else None


def _difference_in_training(layer: nn.Module, x: Tensor, arguments: dict[str, Any]) -> str | None:
    """Of a layer in evaluation: the same while it trains, where it does something else then (a batch norm), and nothing random but
    dropout. Of outputs alone: no mode reaches into a backward pass."""
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with torch.no_grad(), _WithoutDropout():
        evaluated = layer.forward(x, **arguments)
        trained, again = (layer.train().forward(x, **arguments) for _ in range(2))
        if changed := _what_changed(layer, buffers):
            return f"{CHANGES} while it trains: {changed}"
        if torch.equal(evaluated, trained) or not torch.equal(trained, again):
            return None
        what, error = _difference([trained], [_in_chunks(layer)(x, **arguments)])
        return f"while it trains {_differs(what, error)}{_part_that_looks_across(layer, x, arguments)}" if what else None


class _WithoutDropout(TorchFunctionMode):
    """Dropout drops nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.dropout:
            return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))


def _in_chunks(layer: nn.Module) -> Callable[..., Tensor]:
    plan = Plan(chunk_tokens=PROOF_CHUNK, store_outputs=0.5, boundaries="tensor")
    return Segment(Chain(plan, DeviceStore()), [layer], [0], first=True, last=True).forward


def _differs(what: str, error: float) -> str:
    return f"its {what} in chunks of {PROOF_CHUNK} differs from the whole by {error:.1e}: something besides mix looks across tokens"


def _differs_in_chunks(module: nn.Module, x: Tensor) -> str:
    """What of a token-local module is another in chunks; "" where nothing is."""
    in_chunks = lambda x: torch.cat([module(part) for part in x.split(PROOF_CHUNK, dim=1)], dim=1)
    return _difference(*(_outcome(module, forward, x, {}) for forward in (module, in_chunks)))[0]


def _difference(whole: Sequence[Tensor], chunked: Sequence[Tensor]) -> tuple[str, float]:
    """Which of two outcomes' parts differ, first of all, and by how much; "" where none does."""
    for name, a, b in zip(("output", "input gradient", "parameter gradients"), whole, chunked, strict=False):
        error = float((a - b).norm() / a.norm().clamp_min(torch.finfo(a.dtype).tiny))
        if not error <= PROOF_BOUND:
            return name, error
    return "", 0.0


def _outcome(layer: nn.Module, forward: Callable[..., Tensor], x: Tensor, arguments: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the input, gradients of the parameters in one vector."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = forward(x, **arguments)
        generator = torch.Generator(x.device).manual_seed(1)
        dy = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(y, leaves, dy, allow_unused=True) if y.requires_grad else [None] * len(leaves)
    dx, *flat = (torch.zeros_like(t).flatten() if g is None else g.flatten() for t, g in zip(leaves, grads, strict=True))
    return y.detach(), dx, torch.cat(flat) if flat else x.new_zeros(0)


def _part_that_looks_across(layer: nn.Module, x: Tensor, arguments: dict[str, Any]) -> str:
    """Name, class and remedy of the innermost module in `layer` that is another in chunks; "" where none is, taken by itself.

    Looked at are modules that turn one tensor ``[B, T, ...]`` into another.
    """
    calls: dict[str, tuple[nn.Module, Tensor]] = {}

    def note(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], y: Any) -> None:
        alone = len(args) == 1 and not kwargs and all(isinstance(t, Tensor) and t.is_floating_point() for t in (*args, y))
        if alone and args[0].ndim == 3 and y.ndim == 3 and args[0].shape[1] == y.shape[1] == x.shape[1]:
            calls.setdefault(name, (module, args[0].detach()))

    handles = [
        module.register_forward_hook(lambda *call, name=name: note(name, *call), with_kwargs=True)
        for name, module in layer.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            layer.forward(x, **arguments)
    finally:
        for handle in handles:
            handle.remove()
    for name, (module, given) in calls.items():  # in the order in which they were done: those inside of others first
        if what := _differs_in_chunks(module, given):
            scaled = f", as in 8-bit products with tensor-wise scaling: {ROW_WISE}" if _is_linear(module) else ""
            return f"; {name} ({type(module).__name__}) does, by its {what}{scaled}"
    return ""


def _what_changed(layer: nn.Module, before: dict[str, Tensor]) -> str:
    """The first of the layer's buffers that is not as `before`, by name, with the remedy; "" where all are."""
    for name, buffer in layer.named_buffers():
        if not torch.equal(buffer, before[name]):
            owner = layer.get_submodule(name.rpartition(".")[0])
            scaled = (
                f", as in 8-bit products with delayed scaling, whose scales come from earlier calls: {ROW_WISE}"
                if _is_linear(owner)
                else ""
            )
            return f"{name} of {type(owner).__name__}{scaled}"
    return ""


def _quantised(layer: nn.Module) -> str:
    """The first module in it whose weights are codes, which may be why it cannot be run on a copy, and the remedy; "" without one."""
    for name, module in layer.named_modules():
        if any(not p.is_floating_point() for p in module.parameters(recurse=False)):
            kind = type(module).__name__
            return f" ({name}, a {kind}, keeps its weights quantised: longtrain.nn.freeze_linears does so in a way that streams)"
    return ""


def _is_linear(module: nn.Module) -> bool:
    """Whether it is built like a linear layer: a matrix of its own, and nothing else that has parameters."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not any(True for _ in module.children())
