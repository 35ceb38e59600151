"""What a decoder layer of transformers shows when it is run on a few tokens: its calls of the attention interface, whether it chooses among
scores, what it keeps in a cache. What no run shows is proved later (`longtrain.proof`)."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from longtrain.hf.attention import MaskedAttention, Options, draw_seed
from longtrain.hf.mask import Mask
from longtrain.hf.state import ChunkCache, Key, NotCarried, TokensBefore
from longtrain.stream.call import Enough

Run = Callable[..., Any]
"""The layer's own forward, its hidden states given."""


def with_mix(arguments: Mapping[str, Any], mix: Callable[..., Tensor]) -> dict[str, Any]:
    """The arguments of a call whose attention is `mix`."""
    return {name: replace(value, mix=mix) if isinstance(value, Mask) else value for name, value in arguments.items()}


def attention_calls(
    layer: nn.Module, forward: Callable[..., Any], x: Tensor, arguments: Mapping[str, Any], mask: Mask | None
) -> tuple[list[tuple[nn.Module, dict[bool, Options]]], bool]:
    """The attention module of each call of the interface with its options in evaluation and in training, from a run in each; and whether
    the layer picks the largest of some scores. Raises ValueError where it writes into a mapping that layers hand each other."""
    seen: dict[bool, list[tuple[nn.Module, Options]]] = {}
    modes, chose = {module: module.training for module in layer.modules()}, False
    for training in (False, True):
        calls = seen[training] = []

        def note(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: Options, calls=calls) -> Tensor:
            calls.append((module, options))
            return MaskedAttention.make(mask, options, draw_seed(options))(q, k, v)

        layer.train(training)
        try:
            with torch.no_grad(), _Watch() as watch:
                forward(x, **_read_only(with_mix(arguments, note)))
        finally:
            for module, before in modes.items():
                module.training = before
        chose |= watch.chose
    return [(module, {False: a, True: b}) for (module, a), (_, b) in zip(seen[False], seen[True], strict=True)], chose


def states_through(run: Run, arguments: Mapping[str, Any], cache: str, *, attends: bool) -> dict[Key, Tensor]:
    """The states that the layer puts into what it is given by the name `cache`."""
    carried = ChunkCache({})
    with suppress(NotCarried) if attends else nullcontext():  # attention that asks for more of its cache is proved without
        with torch.no_grad():
            run(**{**arguments, cache: carried})
    return carried.after


def gives_attention_the_same(run: Run, arguments: Mapping[str, Any], states: Mapping[Key, Tensor]) -> bool:
    """Whether what its one call of attention is given does not depend on its states: ``run(arguments, states before)``."""
    given: list[tuple[Tensor, ...]] = []

    def note(module: nn.Module, *call: Any) -> None:
        given.append(call[:3])
        raise Enough

    for before in ({}, {key: torch.ones_like(state) for key, state in states.items()}):
        with torch.no_grad(), suppress(Enough):
            run(with_mix(arguments, note), before)
    return all(map(torch.equal, *given)) if given else True


def asks_for_tokens_before(run: Run, arguments: Mapping[str, Any], cache: str, mask: Mask | None) -> bool:
    """Whether it numbers its tokens itself, from as many on as its cache says that came before."""
    whole = lambda module, q, k, v, options: MaskedAttention.make(mask, options, draw_seed(options))(q, k, v)
    before = TokensBefore(0)
    with torch.no_grad(), suppress(NotCarried):  # one that wants more of its cache is proved without
        run(**{**with_mix(arguments, whole), cache: before})
    return before.asked


class _Watch(TorchFunctionMode):
    chose = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.chose |= func in (torch.topk, Tensor.topk)
        return func(*args, **(kwargs or {}))


class _ReadOnly(UserDict):
    """What layers hand each other; a write is refused."""

    def __setitem__(self, key: Any, value: Any) -> None:
        raise ValueError(f"it hands later layers what it made of all tokens (it sets {key!r} of a mapping that it is given), and a chunk "
                         "has a part of them")


def _read_only(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with mappings that cannot be written."""
    watched = dict(arguments)
    for name, value in watched.items():
        if isinstance(value, MutableMapping):
            watched[name] = _ReadOnly()
            watched[name].data = dict(value)
    return watched
