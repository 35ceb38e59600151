"""Tensors that are there when somebody reads them; the first of them, the hidden states behind the last streamed layer.

The layers leave them in the token store; the streamed loss (`head.py`) takes them from there, span by span. Whoever reads them gets them
whole, gathered at that moment, with gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrain.offload import version_of
from longtrain.offload.store import edited
from longtrain.stream.boundary import Boundary, gather, scatter

_METADATA = {
    "shape",
    "dtype",
    "device",
    "ndim",
    "layout",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "is_sparse",
    "is_nested",
    "requires_grad",
    "names",
}
_OF_GRAPH = {"grad_fn", "is_leaf", "output_nr", "_backward_hooks"}
_QUESTIONS = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size}
_RESHAPES = {Tensor.view, Tensor.reshape, torch.reshape}


class Promise(Tensor):
    """A tensor that is there when somebody reads it: `compute`. Until then it has a shape, a dtype and a device."""

    metadata, questions = _METADATA, _QUESTIONS

    def compute(self) -> Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        if (func.__name__ == "__get__" and name in cls.metadata) or func in cls.questions:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if (noted := cls._noted(func, args, kwargs)) is not None:
            return noted
        compute = lambda x: x.compute() if isinstance(x, Promise) else x
        args, kwargs = torch.utils._pytree.tree_map(compute, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def _noted(cls, func, args: Sequence[Any], kwargs: dict[str, Any]) -> Promise | None:
        """What a step makes of the promise, or None where only its contents can tell."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} was called on a {cls.__name__} that was not computed; read it by an ordinary torch function first")

    def __repr__(self, **unused) -> str:
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}: not computed)"


class LazyHidden(Promise):
    """Hidden states ``[B, T, E]`` behind the last streamed layer, in the token store until they are read or taken.

    A node of the graph like any tensor: its gradient goes into the store, span by span.
    """

    metadata, questions = _METADATA | _OF_GRAPH, _QUESTIONS | {Tensor.register_hook}

    @classmethod
    def behind(cls, stand_in: Tensor, boundary: Boundary) -> LazyHidden:
        hidden = _Kept.apply(stand_in, boundary)
        hidden.stand_in, hidden.boundary, hidden.values, hidden.taken = stand_in, boundary, None, False
        return hidden

    def compute(self) -> Tensor:
        if self.taken:
            raise RuntimeError(
                "hidden states or logits were read after the streamed loss had taken the hidden states out of the token store, chunk "
                'by chunk: read them from a call without labels or under torch.no_grad(), or use Plan(boundaries="tensor")'
            )
        if self.values is None:
            self.values = gather(self.boundary.value, self.boundary)
            self.version = version_of(self.values)
        if version_of(self.values) != self.version:
            raise RuntimeError(edited("the hidden states behind the last layer"))
        return _Read.apply(self)

    def take(self) -> tuple[Tensor, Boundary | None]:
        """What a streamed loss works on: the stand-in and its boundary, or the hidden states where they have been read.

        With gradients the loss frees them as it goes, and nobody can read them afterwards.
        """
        if self.values is not None or self.taken:
            return self.compute(), None
        self.taken = torch.is_grad_enabled()
        return self.stand_in, self.boundary

    @classmethod
    def _noted(cls, func, args: Sequence[Any], kwargs: dict[str, Any]) -> Promise | None:
        """Itself, where a step changes nothing: all tokens chosen, the same shape, the same dtype."""
        if kwargs or not args or not isinstance(hidden := args[0], LazyHidden):
            return None
        others = args[1] if len(args) == 2 and isinstance(args[1], tuple) else args[1:]
        if any(isinstance(part, Tensor) for part in others):
            return None
        if func is Tensor.__getitem__:
            same = all(part is Ellipsis or part in (slice(None), slice(0, None)) for part in others)
        elif func in _RESHAPES:
            same = len(others) == hidden.ndim and all(n in (-1, size) for n, size in zip(others, hidden.shape, strict=True))
        else:
            same = func is Tensor.contiguous or (func is Tensor.to and others in ((hidden.dtype,), (hidden.device,)))
        return hidden if same else None


class _Kept(torch.autograd.Function):
    """Stand-in -> `LazyHidden`; the backward puts the gradient into the store."""

    @staticmethod
    def forward(ctx, stand_in: Tensor, boundary: Boundary) -> LazyHidden:
        ctx.boundary = boundary
        return Tensor._make_wrapper_subclass(LazyHidden, boundary.shape, dtype=stand_in.dtype, device=stand_in.device)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_BTE: Tensor):
        scatter(ctx.boundary.grad, ctx.boundary, dx_BTE)
        return ctx.boundary.stand_in, None


class _Read(torch.autograd.Function):
    """`LazyHidden` -> the hidden states."""

    @staticmethod
    def forward(ctx, hidden: LazyHidden) -> Tensor:
        return hidden.values.detach()

    @staticmethod
    def backward(ctx, dx_BTE: Tensor) -> Tensor:
        return dx_BTE
