"""What streaming the layers of a transformers model costs, probed like any other layer's, on hidden states that the model itself makes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from longtrain.plan import Plan
from longtrain.stream.footprint import PROBE_TOKENS, LayerFootprint, probe_layer

WIDEST_WINDOW = 1 << 15
"""Tokens of the row on which windows are looked for; a wider one counts as none, which is never too little memory."""


def probe_transformers(model: nn.Module) -> tuple[list[nn.Module], list[LayerFootprint], nn.Linear | None]:
    """The layers of a transformers model, what each costs, and its head; nothing of a model that is none. The model stays as it was.

    Layers are traced once for each probed length (`longtrain.hf.trace`); those of one kind cost the same, but for their windows, which such
    lengths do not show. Raises ValueError naming a layer that cannot be streamed.
    """
    if "transformers" not in sys.modules:
        return [], [], None
    from longtrain import hf  # an extra: only for models that cannot exist without it

    if (pretrained := hf.pretrained_of(model)) is None:
        return [], [], None
    shorter, longer = PROBE_TOKENS
    with adapted_to(model, shorter) as found:
        examples = {f.module: {shorter: (f.adapted.x, f.adapted.arguments)} for f in found}
    with adapted_to(model, longer) as found:
        costs: dict = {}
        for f in found:
            examples[f.module][longer] = f.adapted.x, f.adapted.arguments
            f.module.example = examples[f.module].__getitem__
            if f.adapted.kind not in costs:
                costs[f.adapted.kind] = probe_layer(f.module)
        small, large = (sum(_tensors([examples[f.module][n][1] for f in found]).values()) for n in PROBE_TOKENS)
        costs = {kind: replace(cost, arguments=(large - small) // (longer - shorter)) for kind, cost in costs.items()}  # of all layers
        known: dict = {}
        footprints = [
            known.setdefault((f.adapted.kind, mixers), replace(costs[f.adapted.kind], mixers=mixers) if mixers else costs[f.adapted.kind])
            for f, mixers in zip(found, mixers_on_long_rows(pretrained, found), strict=True)
        ]
    head = pretrained.get_output_embeddings()
    return [f.module for f in found], footprints, head if isinstance(head, nn.Linear) else None


def _tensors(arguments: Any) -> dict[int, int]:
    """Bytes of each tensor, once."""
    return {id(t): t.nbytes for t in tree_leaves(arguments) if isinstance(t, Tensor)}


def mixers_on_long_rows(pretrained: nn.Module, found: Sequence) -> list[tuple[Any, ...]]:
    """The attention calls of each layer, as a row longer than their windows has them; () for layers that have none. The model makes its
    masks and positions; its embedding and its layers give out zeros that take no memory, and the last of them ends the run."""
    longest = getattr(pretrained.config.get_text_config(), "max_position_embeddings", None) or WIDEST_WINDOW
    embedding, given = pretrained.get_input_embeddings(), {}

    def embed(ids_BT: Tensor) -> Tensor:
        return embedding.weight.new_zeros(()).expand(*ids_BT.shape, embedding.weight.shape[1])

    def layer(of, *args: Any, **kwargs: Any) -> Any:
        x, arguments = of.adapted.bind(args, kwargs)
        given[of.module] = of.adapted.mixers(**arguments) if of.adapted.attentions else ()
        if len(given) == len(found):
            raise _AllSeen
        return (x, *[None] * (of.adapted.outputs - 1)) if of.adapted.outputs else x

    with ExitStack() as stack, torch.random.fork_rng(devices=[]), torch.no_grad(), suppress(_AllSeen):
        stack.enter_context(_in_place_of(embedding, embed))
        for f in found:
            stack.enter_context(_in_place_of(f.module, partial(layer, f)))
        ids_BT = torch.zeros(1, min(longest, WIDEST_WINDOW), dtype=torch.int64, device=embedding.weight.device)
        pretrained(input_ids=ids_BT, use_cache=False)
    return [tuple(getattr(mixer, "base", mixer) for mixer in given[f.module]) for f in found]  # a mask without padding is its `base`


class _AllSeen(Exception):
    """Every layer was called."""


@contextmanager
def _in_place_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def layers_differ(model: nn.Module) -> bool:
    """Whether a transformers model says that its layers are of several kinds, which are given masks and positions of their own."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return len(set(getattr(text, "layer_types", None) or ())) > 1


@contextmanager
def adapted_to(model: nn.Module, tokens: int) -> Iterator[list]:
    """The layers as `longtrain.hf` finds them on so many tokens, streamable meanwhile."""
    from longtrain import hf

    undo: list = []
    try:
        found = [f for run in hf.adapt(model, Plan(chunk_tokens=tokens), tokens, undo).runs for f in run if f.is_layer]
        for f in found:
            if f.refusal is not None:
                raise ValueError(f"{f.name} cannot be streamed: {f.refusal}")
        yield found
    finally:
        while undo:
            undo.pop()()
