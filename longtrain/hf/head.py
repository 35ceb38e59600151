"""The language-model head without logits: the projection gives out a promise of them, the loss is streamed from what it was made of.

`lm_head` returns `LazyLogits`, which have logits' shape and hold none. What models do to logits between head and loss (scale, softcap,
conversions) is noted; the loss function then streams hidden states, weight and those steps. Whoever reads the logits gets them, computed
at that moment, with gradients, at the price of ``[B, T, V]``. The hidden states behind the last streamed layer are such a promise too
(`LazyHidden`): they lie in the token store, and the streamed loss takes them from there, span by span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtrain.hf.promise import LazyHidden, Promise
from longtrain.offload import version_of
from longtrain.ops.linear_cross_entropy import LossOptions, default_chunk_tokens
from longtrain.span import IGNORE_INDEX
from longtrain.stream.boundary import Boundary
from longtrain.stream.logprobs import streamed_token_logprobs
from longtrain.stream.loss import streamed_token_loss

_PRODUCTS = {Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul}
_QUOTIENTS = {Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide, Tensor.true_divide}
_TANH = {Tensor.tanh, torch.tanh}


class Scaled(nn.Module):
    """A token-local factor, in the place of a norm."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x if self.factor == 1 else x * self.factor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recipe:
    """How to make the logits: ``softcap * tanh(scale * head(hidden) / softcap)``, or ``scale * head(hidden)`` without softcap."""

    hidden_BTE: Tensor
    head: nn.Linear
    project: Callable[[Tensor], Tensor]
    """The head's own `forward`."""
    chunk_tokens: int | None
    scale: float = 1.0
    softcap: float | None = None

    def scaled(self, factor: float) -> Recipe | None:
        scale = self.scale * factor
        scale = 1.0 if abs(scale - 1) < 1e-12 else scale  # x / c * c
        if self.softcap is None:
            return replace(self, scale=scale)
        # factor * (c tanh(s z / c)) = c' tanh(s' z / c') with c' = factor c, s' = factor s
        return replace(self, softcap=self.softcap * factor, scale=scale) if factor > 0 else None

    def capped(self) -> Recipe | None:
        return replace(self, softcap=1.0) if self.softcap is None else None

    @property
    def streams(self) -> bool:
        """Whether loss and log-probabilities can be had without logits: a scaled bias cannot."""
        return self.scale == 1 or self.head.bias is None

    def loss(self, targets_BT: Tensor, *, ignore_index: int = IGNORE_INDEX, **settings: Any) -> Tensor:
        """`streamed_token_loss`; `settings`: its normalizer and reduction."""
        hidden, boundary = self._taken()
        return streamed_token_loss(
            hidden, Scaled(self.scale), self.head, targets_BT, options=LossOptions(ignore_index=ignore_index, softcap=self.softcap),
            chunk_tokens=self.chunk_tokens, boundary=boundary, **settings,
        )  # fmt: skip

    def logprobs(self, targets_BT: Tensor, *, temperature: float, chunk_tokens: int | None) -> tuple[Tensor, Tensor]:
        """`streamed_token_logprobs`."""
        hidden, boundary = self._taken()
        return streamed_token_logprobs(
            hidden, Scaled(self.scale), self.head, targets_BT, temperature=temperature, softcap=self.softcap,
            chunk_tokens=chunk_tokens or self.chunk_tokens, boundary=boundary,
        )  # fmt: skip

    def _taken(self) -> tuple[Tensor, Boundary | None]:
        return self.hidden_BTE.take() if isinstance(self.hidden_BTE, LazyHidden) else (self.hidden_BTE, None)


class LazyLogits(Promise):
    """Logits ``[B, T, V]`` that are computed when somebody reads them."""

    @staticmethod
    def __new__(cls, recipe: Recipe, steps: tuple[Callable[[Tensor], Tensor], ...] = (), dtype: torch.dtype | None = None) -> LazyLogits:
        hidden = recipe.hidden_BTE
        shape = (*hidden.shape[:-1], recipe.head.out_features)
        logits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype or hidden.dtype, device=hidden.device)
        logits.recipe, logits.steps, logits.computed, logits.version = recipe, steps, None, 0
        return logits

    @property
    def edited(self) -> bool:
        """Whether somebody has read the logits and changed them in place (masked entries of the vocabulary): the recipe is not theirs."""
        return self.computed is not None and version_of(self.computed) != self.version

    @property
    def streams(self) -> bool:
        """Whether loss and log-probabilities can be had without logits."""
        return self.recipe.streams and not self.edited

    def compute(self) -> Tensor:
        """The logits themselves: the head's own output, and the steps as they were written."""
        if self.computed is None:
            logits = self.recipe.project(self.recipe.hidden_BTE)
            for step in self.steps:
                logits = step(logits)
            self.computed, self.version = logits, version_of(logits)
        return self.computed

    @classmethod
    def _noted(cls, func, args: Sequence[Any], kwargs: dict[str, Any]) -> LazyLogits | None:
        """What an elementwise step makes of a promise, or None where only the logits themselves can tell."""
        if kwargs or not args:
            return None
        logits, *others = args
        if not isinstance(logits, LazyLogits) and len(others) == 1:  # number * logits
            logits, others = others[0], [logits] if func in _PRODUCTS else [None]
        if not isinstance(logits, LazyLogits) or logits.edited:
            return None
        recipe, dtype = logits.recipe, logits.dtype
        if not others and func in _TANH:
            recipe = recipe.capped()
        elif not others and func is Tensor.float:
            dtype = torch.float32
        elif len(others) == 1 and func is Tensor.to and isinstance(others[0], torch.dtype):
            dtype = others[0]
        elif len(others) == 1 and isinstance(others[0], Real) and func in _PRODUCTS:
            recipe = recipe.scaled(float(others[0]))
        elif len(others) == 1 and isinstance(others[0], Real) and func in _QUOTIENTS:
            recipe = recipe.scaled(1 / float(others[0]))
        elif others or func is not Tensor.contiguous:
            return None
        return None if recipe is None else LazyLogits(recipe, (*logits.steps, lambda x: func(x, *others)), dtype)


def lazy_forward(head: nn.Linear, project: Callable[[Tensor], Tensor], chunk_tokens: int | None, hidden_BTE: Tensor) -> Tensor:
    """What takes the place of the head's `forward`: ordinary logits up to one chunk of tokens, a promise of them beyond."""
    at_once = chunk_tokens or default_chunk_tokens(head.out_features, hidden_BTE.device, hidden_BTE.dtype)
    if hidden_BTE.shape[:-1].numel() <= at_once:
        return project(hidden_BTE)
    return LazyLogits(Recipe(hidden_BTE=hidden_BTE, head=head, project=project, chunk_tokens=chunk_tokens))


def streamed_loss(
    otherwise: Callable[..., Tensor],
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """As transformers' `ForCausalLMLoss` (`otherwise`, which still serves logits that were computed), without logits beyond a chunk.

    Labels are moved one place left inside unless `shift_labels` has them so; `num_items_in_batch` divides the sum, where it is given.
    """
    if not isinstance(logits, LazyLogits) or not logits.streams:
        return otherwise(
            logits,
            labels,
            vocab_size,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
            shift_labels=shift_labels,
            **kwargs,
        )
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    recipe = logits.recipe
    targets = shift_labels.to(recipe.hidden_BTE.device).view(recipe.hidden_BTE.shape[:-1])
    return recipe.loss(targets, normalizer=num_items_in_batch, ignore_index=ignore_index)
