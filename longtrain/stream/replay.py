"""Running a layer on one span again, exactly as the forward pass ran it: arguments, parameters, random state, autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from longtrain.offload import version_of
from longtrain.span import Span


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The `forward` that `module` has now. Pickled with the module it stays that one: a bound method would come back by its name, as
    whatever has taken its place."""
    return module.__dict__.get("forward") or partial(type(module).forward, module)


class BareLayer(nn.Module):
    """A layer under the `forward` it had before it was replaced, with its parameters exchangeable (`torch.func.functional_call`)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.original_forward = layer, forward_of(layer)

    def forward(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        return self.original_forward(x, **arguments)


class LayerMixers(nn.Module):
    """A layer's `mixers`, with its parameters exchangeable like those of `BareLayer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, arguments: dict[str, Any]) -> Sequence[Any]:
        return self.layer.mixers(**arguments)


class Arguments:
    """A layer's keyword arguments: cut along the tokens where they run along them, their differentiable tensors listed."""

    def __init__(self, arguments: Mapping[str, Any], token_args: Mapping[str, int]) -> None:
        self.leaves, self._spec = tree_flatten(dict(arguments))
        self._axes: list[int | None] = []
        for key, value in arguments.items():
            self._axes += [token_args.get(key)] * len(tree_flatten(value)[0])
        self._versions = [version_of(leaf) if isinstance(leaf, Tensor) else 0 for leaf in self.leaves]
        self.differentiable = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]

    def check(self, tokens: int) -> None:
        """Raise ValueError where a token-wise argument is not as long as the sequence."""
        for leaf, axis in zip(self.leaves, self._axes, strict=True):
            if axis is not None and leaf is not None and not isinstance(leaf, Tensor):
                raise ValueError(f"a token-wise layer argument must be a tensor, found {type(leaf).__name__}")
            if axis is not None and isinstance(leaf, Tensor) and leaf.shape[axis] != tokens:
                raise ValueError(f"a token-wise layer argument has shape {list(leaf.shape)}: axis {axis} must have {tokens} tokens")

    def check_unchanged(self) -> None:
        """Raise RuntimeError where an argument was edited between forward and backward."""
        for leaf, version in zip(self.leaves, self._versions, strict=True):
            if isinstance(leaf, Tensor) and version_of(leaf) != version:
                raise RuntimeError(
                    f"an argument of a streamed layer, shape {list(leaf.shape)}, was modified in place between forward and backward; "
                    "give each step its own tensor"
                )

    def on(self, span: Span, leaves: Sequence[Any] | None = None) -> dict[str, Any]:
        """The arguments of one span; `leaves` replaces the tensors (the differentiable ones by their replicas)."""
        leaves = self.leaves if leaves is None else leaves
        return tree_unflatten([self._cut(leaf, axis, span) for leaf, axis in zip(leaves, self._axes, strict=True)], self._spec)

    @staticmethod
    def _cut(leaf: Any, axis: int | None, span: Span) -> Any:
        if axis is None or not isinstance(leaf, Tensor):
            return leaf
        return leaf.narrow(axis, span.start, len(span))


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Autocast as it was in the forward pass, to be entered again around a replay."""

    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def capture(cls, device: torch.device) -> Surroundings:
        kinds = dict.fromkeys((device.type, "cpu") if device.type != "meta" else ("cpu",))  # shapes alone know no autocast
        return cls(tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds))

    @contextmanager
    def restored(self) -> Iterator[None]:
        # Cast weights are not cached: a cached cast would tie the graph of one chunk to the freed graph of another.
        with ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


class _Choices(TorchFunctionMode):
    """Keeps the indices that every `topk` chose (the experts of a router), or chooses as was kept before."""

    def __init__(self, kept: list[Tensor], *, replay: bool) -> None:
        super().__init__()
        self._kept, self._replay, self._next = kept, replay, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **kwargs)
        scores = args[0] if args else kwargs["input"]
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
        if not self._replay:
            chosen = func(*args, **kwargs)
            self._kept.append(chosen.indices.to(torch.int16 if scores.shape[dim] < 2**15 else torch.int64))
            return chosen
        indices = self._kept[self._next].long()
        self._next += 1
        return torch.return_types.topk((scores.gather(dim, indices), indices))


class RandomStates:
    """What a span's forward pass drew or chose, for its replays: the generators' states before it, kept only for spans that drew from
    them, and with `choices` the indices of every `topk`, which a rounding difference could change."""

    def __init__(self, device: torch.device, *, choices: bool = False) -> None:
        self._device = device
        self._states: dict[Span, tuple[Tensor, ...]] = {}
        self._choices: dict[Span, list[Tensor]] | None = {} if choices else None

    @contextmanager
    def recorded(self, span: Span) -> Iterator[None]:
        before = self._snapshot()
        with nullcontext() if self._choices is None else _Choices(self._choices.setdefault(span, []), replay=False):
            yield
        if any(not torch.equal(a, b) for a, b in zip(before, self._snapshot(), strict=True)):
            self._states[span] = before

    @contextmanager
    def restored(self, span: Span) -> Iterator[None]:
        with self._chosen(span), self._drawn(span):
            yield

    def _chosen(self, span: Span) -> AbstractContextManager:
        return nullcontext() if not self._choices else _Choices(self._choices[span], replay=True)

    @contextmanager
    def _drawn(self, span: Span) -> Iterator[None]:
        if span not in self._states:
            yield
            return
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            cpu, *device = self._states[span]
            torch.set_rng_state(cpu)
            for state in device:
                torch.cuda.set_rng_state(state, self._device)
            yield

    def assign(self, spans: Sequence[Span]) -> None:
        """Give each span a state of its own, drawn from the generator: for layers that run on a span in several passes."""
        for span, seed in zip(spans, torch.randint(2**62, (len(spans),)).tolist(), strict=True):
            devices = ["cpu", self._device] if self._device.type == "cuda" else ["cpu"]
            self._states[span] = tuple(torch.Generator(d).manual_seed(seed).get_state() for d in devices)

    def _snapshot(self) -> tuple[Tensor, ...]:
        cpu = torch.get_rng_state()
        return (cpu, torch.cuda.get_rng_state(self._device)) if self._device.type == "cuda" else (cpu,)


class Mix:
    """The `mix` that a layer is given for one span: its n-th call goes to the n-th of `steps`."""

    def __init__(self, steps: Sequence[Callable[..., Tensor]]) -> None:
        self._steps, self._calls = steps, 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self._calls == len(self._steps):
            raise RuntimeError(f"the layer called mix more than {len(self._steps)} times, the number of its mixers()")
        self._calls += 1
        return self._steps[self._calls - 1](*inputs)

    def check_all_called(self) -> None:
        if self._calls != len(self._steps):
            raise RuntimeError(f"the layer called mix {self._calls} times, its mixers() names {len(self._steps)}")


class Parameters:
    """The parameters of a segment's layers, each once, and detached aliases of them for replays.

    Replays differentiate the aliases, so that hooks on the parameters fire once, when the segment returns its sums.
    """

    def __init__(self, layers: Sequence[BareLayer]) -> None:
        self.tensors: list[nn.Parameter] = []
        self._index: list[dict[str, int]] = []
        seen: dict[int, int] = {}
        for layer in layers:
            names = {}
            for name, parameter in layer.named_parameters():
                if id(parameter) not in seen:
                    seen[id(parameter)] = len(self.tensors)
                    self.tensors.append(parameter)
                names[name] = seen[id(parameter)]
            self._index.append(names)

    def named(self, layer: int, aliases: Sequence[Tensor]) -> dict[str, Tensor]:
        """The aliases under the names of one layer."""
        return {name: aliases[i] for name, i in self._index[layer].items()}


def call_layer(layer: BareLayer, x: Tensor, arguments: dict[str, Any], mix: Mix, parameters: dict[str, Tensor] | None) -> Tensor:
    """One layer on one span, under its own parameters or under `parameters`."""
    arguments = {**arguments, "mix": mix}
    y = layer(x, arguments) if parameters is None else functional_call(layer, parameters, (x, arguments))
    mix.check_all_called()
    return y


class GradientSums:
    """Sums of gradients over spans, in float32 or wider; None where nothing was added."""

    def __init__(self, count: int) -> None:
        self.totals: list[Tensor | None] = [None] * count
        self._owned = [False] * count

    def add(self, index: int, grad: Tensor | None) -> None:
        total = self.totals[index]
        if grad is None:
            return
        if total is None:
            self.totals[index] = grad.to(torch.promote_types(grad.dtype, torch.float32))
        elif self._owned[index]:
            total += grad
        else:  # autograd may have handed the first gradient to another tensor too: never edit that one
            self.totals[index], self._owned[index] = total + grad, True


def delivered(tensor: Tensor, total: Tensor | None) -> Tensor | None:
    """A wide gradient sum as an autograd Function is to return it for `tensor`.

    Autograd rounds what it is given to the tensor's dtype, unless `grad_dtype` (torch 2.13) says otherwise; `main_grad`, where a
    parameter has one, takes the wide sum directly.
    """
    if total is None or not tensor.is_leaf:
        return total
    if (main_grad := getattr(tensor, "main_grad", None)) is not None:
        main_grad.add_(total)
        return None
    grad_dtype = getattr(tensor, "grad_dtype", tensor.dtype)
    return total if grad_dtype is None else total.to(grad_dtype)
