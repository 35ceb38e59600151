"""What the cost model needs to know of a model: its layers and loss probed, its parameters counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from longtrain.nn.ends import TokenLoss
from longtrain.planner.pretrained import layers_differ, probe_transformers
from longtrain.stream.footprint import LayerFootprint, gradient_bytes, probe_layer
from longtrain.stream.loss import probe_loss
from longtrain.stream.protocol import StreamableLayer
from longtrain.stream.work import Line, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFootprint:
    """What the formulas need to know of a model. Bytes; `head_*` of the loss head, zero where the model has none of ours."""

    layers: tuple[LayerFootprint, ...]
    parameters: int
    trained: int
    """Number of trained parameters."""
    other_gradients: int
    """What `.grad` holds of parameters that are in no layer: embedding, final norm, head."""
    embedding_sums: int
    """The embedding's gradient while it is added up, float32 or wider; 0 where it is not trained."""
    optimizer: int
    vocab_size: int
    head_gradients: int
    """The head's gradient while the loss adds it up."""
    head_delivered: int
    """What `.grad` holds of it."""
    loss: tuple[Line, ...]
    """What the loss holds of a part of so many tokens beside hidden states and `head_gradients`."""
    loss_work: Work
    """And what it does."""
    width: int
    norm_is_layer: bool
    """Whether the last norm is streamed like a layer (transformers): its input is there too while the loss runs."""
    dtype: torch.dtype
    device: torch.device
    alike: bool = True
    """Whether all layers are given the same arguments, as those of one segment must be."""
    outside: int = 0
    """Bytes of parameters that are in no layer, whole."""
    sharded: bool = False
    """Whether `parameters` are a device's shard, and those in use are gathered beside it (`gathered_bytes`)."""

    def at(self, chunk_tokens: int) -> tuple[LayerFootprint, ...]:
        """The layers in chunks of so many tokens."""
        return tuple(layer.at(chunk_tokens) for layer in self.layers)


def measure_model(model: nn.Module, optimizer_bytes_per_parameter: int = 8) -> ModelFootprint:
    """Probe a model's layers and count its parameters; one on the meta device will do. Raises ValueError when it has no layer that can be
    streamed."""
    layers = [
        layer
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(isinstance(m, StreamableLayer) for m in module)
        for layer in module
    ]
    footprints = _probe_alike(layers)
    head = getattr(model, "lm_head", None) if any(isinstance(m, TokenLoss) for m in model.modules()) else None
    norm = model.model.norm if head is not None else nn.Identity()
    if not layers:
        layers, footprints, head = probe_transformers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers that can be streamed: see longtrain.stream.protocol.StreamableLayer")
    trainable = {id(p): p for p in model.parameters() if p.requires_grad}
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    others = [p for key, p in trainable.items() if key not in in_layers]
    head_trained = head is not None and head.weight.requires_grad
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and id(m.weight) in trainable]
    first = next(model.parameters())
    loss, loss_work = ((), Work()) if head is None else probe_loss(norm, head)
    return ModelFootprint(
        layers=tuple(footprints),
        parameters=sum(p.nbytes for p in model.parameters()),
        trained=sum(p.numel() for p in trainable.values()),
        other_gradients=sum(map(gradient_bytes, others)),
        embedding_sums=sum(w.numel() * max(w.element_size(), 4) for w in embeddings),
        optimizer=optimizer_bytes_per_parameter * sum(p.numel() for p in trainable.values()),
        vocab_size=head.out_features if head is not None else 0,
        head_gradients=head.weight.numel() * max(head.weight.element_size(), 4) if head_trained else 0,
        head_delivered=gradient_bytes(head.weight) if head_trained else 0,
        loss=loss,
        loss_work=loss_work,
        width=head.in_features if head is not None else 0,
        norm_is_layer=isinstance(norm, nn.Identity),
        dtype=first.dtype,
        device=first.device,
        alike=not layers_differ(model),
        outside=sum(p.nbytes for p in model.parameters() if id(p) not in in_layers),
    )


def _probe_alike(layers: Sequence[nn.Module]) -> list[LayerFootprint]:
    """Layers that are printed alike, and whose parameters are, cost alike: one of them is probed."""
    known: dict = {}
    found = []
    for layer in layers:
        parameters = tuple((p.shape, p.dtype, p.requires_grad, gradient_bytes(p)) for p in layer.parameters())
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            key = (type(layer), repr(layer), parameters, repr(layer.mixers(**layer.example(2)[1])))
        if key not in known:
            known[key] = probe_layer(layer)
        found.append(known[key])
    return found
