"""Finding the decoder layers of a transformers model by running it on a few tokens and looking, never by name.

A run of layers is a module list whose members are called once each, in order, on hidden states ``[B, T, E]`` and give out the like. Which
of their arguments run along the tokens shows in two runs of different lengths. The module that alone takes the last layer's output (the
final norm) is token-local in every family, and is streamed as one more layer if its proof says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from longtrain.hf.layer import AdaptedLayer, bind
from longtrain.sharded import whole


@dataclass(slots=True, eq=False)
class Seen:
    """One module's call in the traced run."""

    name: str
    module: nn.Module
    x: Tensor
    arguments: dict[str, Any]
    y: Any = None
    calls: int = 1

    @property
    def output(self) -> Any:
        return self.y[0] if isinstance(self.y, tuple) and self.y else self.y


@dataclass(frozen=True, slots=True)
class Found:
    """A module that could be streamed, or why not; `follows` is whether it is given just what the one before it gave out."""

    name: str
    module: nn.Module
    adapted: AdaptedLayer | None
    refusal: str | None
    follows: bool
    is_layer: bool = True


def find_layers(model: nn.Module, run: Callable[[int], Any], tokens: int) -> list[list[Found]]:
    """The runs of layers of `model`, where ``run(tokens)`` calls it on a row of so many tokens."""
    long, short = _trace(model, run, tokens), _trace(model, run, tokens - 2)
    runs = []
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for name, modules in lists.items():
        if any(name.startswith(f"{other}.") for other in lists):  # experts and other lists inside layers
            continue
        called = [long[m] for m in modules if m in long]
        if not called or not all(_is_layer(seen, tokens) for seen in called):
            continue
        run_of = [_found(model, seen, short[seen.module], tokens, before) for seen, before in zip(called, [None, *called], strict=False)]
        after = next((s for s in long.values() if s.x is called[-1].output and s.module not in modules), None)
        if after is not None and not after.arguments and _is_layer(after, tokens):
            run_of.append(_found(model, after, short[after.module], tokens, called[-1], is_layer=False))
        runs.append(run_of)
    return runs


def _is_layer(seen: Seen, tokens: int) -> bool:
    y = seen.output
    return isinstance(y, Tensor) and seen.x.ndim == 3 and seen.x.shape[1] == tokens and y.shape == seen.x.shape


def _found(model: nn.Module, seen: Seen, shorter: Seen, tokens: int, before: Seen | None, *, is_layer: bool = True) -> Found:
    follows = before is not None and before.output is seen.x
    adapted, refusal = None, _unfit(seen)
    if refusal is None:
        try:
            token_args = _token_args(seen.arguments, shorter.arguments, tokens)
            adapted = AdaptedLayer(seen.module, seen.x, seen.arguments, token_args, len(seen.y) if isinstance(seen.y, tuple) else 0)
            with whole(seen.module, model):
                adapted.observe()
        except Exception as error:  # whatever it is, it is the reason: reported by name, never dropped
            adapted, refusal = None, f"{type(error).__name__}: {error}"
    return Found(seen.name, seen.module, adapted, refusal, follows, is_layer)


def _unfit(seen: Seen) -> str | None:
    if seen.calls > 1:
        return f"it is called {seen.calls} times in one pass: a layer that is used twice cannot be streamed"
    if isinstance(seen.y, tuple) and any(extra is not None for extra in seen.y[1:]):
        return f"it gives out {len(seen.y)} things beside hidden states"
    return None


def _token_args(long: Mapping[str, Any], short: Mapping[str, Any], tokens: int) -> dict[str, int]:
    """Arguments that run along the tokens, with their axis: where the two traced lengths show."""
    axes = {}
    for name, value in long.items():
        found = set()
        for a, b in zip(tree_flatten(value)[0], tree_flatten(short[name])[0], strict=True):
            if isinstance(a, Tensor):
                differing = [i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
                if len(differing) > 1:
                    raise ValueError(f"its argument {name}, shape {list(a.shape)}, joins tokens with tokens: a mask or bias as a tensor")
                found.add(differing[0] if differing else None)
        if len(found) > 1:
            raise ValueError(f"its argument {name} holds tensors that run along the tokens on different axes")
        if (axis := next(iter(found), None)) is not None:
            axes[name] = axis
    return axes


def _trace(model: nn.Module, run: Callable[[int], Any], tokens: int) -> dict[nn.Module, Seen]:
    """Every module's first call with a tensor, in order."""
    seen: dict[nn.Module, Seen] = {}
    names = {module: name for name, module in model.named_modules()}

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module in seen:
            seen[module].calls += 1
            return
        try:
            x, arguments = bind(inspect.signature(module.forward), args, kwargs)
        except (TypeError, KeyError, StopIteration):  # not a call of one thing with arguments: no layer
            return
        if isinstance(x, Tensor):
            seen[module] = Seen(names[module], module, x, arguments)

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], y: Any) -> None:
        if module in seen and seen[module].y is None:
            seen[module].y = y

    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        for module in names:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        run(tokens)
    return seen


@contextmanager
def _evaluating(model: nn.Module):
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
