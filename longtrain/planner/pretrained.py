"""What streaming the layers of a transformers model costs, probed like any other layer's, on hidden states that the model itself makes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from longtrain.plan import Plan
from longtrain.stream.footprint import PROBE_TOKENS, LayerFootprint, probe_layer


def probe_transformers(model: nn.Module) -> tuple[list[nn.Module], list[LayerFootprint], nn.Linear | None]:
    """The layers of a transformers model, what each costs, and its head; nothing of a model that is none. The model stays as it was.

    Layers are traced once for each probed length (`longtrain.hf.trace`); those of one kind cost the same. Raises ValueError naming a layer
    that cannot be streamed.
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
        footprints = [costs[f.adapted.kind] for f in found]
    head = pretrained.get_output_embeddings()
    return [f.module for f in found], footprints, head if isinstance(head, nn.Linear) else None


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
