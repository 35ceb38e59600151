"""A step on several devices: how sequences and parameters are spread, and what then is on one device and between them.

`sequence` devices share each sequence, chunk by chunk (longtrain.parallel); `replicas` of them work on sequences of their own; parameters,
gradients and optimizer are sharded over all (FSDP2), and gathered one segment at a time, the next one ahead; what is in no layer is the
root's, which is gathered in the forward pass, and whose gradients are whole until the backward pass has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from longtrain.parallel.cost import Shape, choose
from longtrain.plan import Plan
from longtrain.planner.footprint import ModelFootprint
from longtrain.planner.rates import Rates
from longtrain.planner.seconds import head_dim
from longtrain.stream.footprint import LayerFootprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    sequence: int = 1
    replicas: int = 1

    @property
    def devices(self) -> int:
        return self.sequence * self.replicas

    def __str__(self) -> str:
        return f"{self.sequence} x {self.replicas}"


def all_axes(devices: int) -> Iterator[Axes]:
    """Every way to use so many devices."""
    for sequence in range(1, devices + 1):
        if devices % sequence == 0:
            yield Axes(sequence=sequence, replicas=devices // sequence)


def shape_of(layer: LayerFootprint, model: ModelFootprint) -> Shape | None:
    """What of an attention layer decides its traffic; None for other mixers."""
    if not layer.lse:
        return None
    dim, mixer = round(head_dim(layer, model)), layer.mixers[0]
    heads = layer.lse // 4
    window = mixer.window_size[0] + 1 if getattr(mixer, "window_size", (-1,))[0] >= 0 else None
    kv_heads = max(1, layer.carry // (2 * dim * model.dtype.itemsize))
    return Shape(
        heads=heads, kv_heads=kv_heads, head_dim=dim, value_dim=dim, itemsize=model.dtype.itemsize, window=window, causal=layer.causal
    )


def on_one_device(model: ModelFootprint, axes: Axes, *, optimizer: str, masters: bool) -> ModelFootprint:
    """The footprint that one device has: its shard, what it gathers, its replicas of key and value heads. With `optimizer` "host" AdamW's
    moments, and the float32 weights that `masters` says there are, take nothing on the device."""
    shards = axes.devices
    states = 0 if optimizer == "host" else (model.optimizer + 4 * model.trained * masters) // shards
    if shards == 1:
        return replace(model, optimizer=states)

    def spread(layer: LayerFootprint) -> LayerFootprint:
        shape = shape_of(layer, model)
        copies = 1 if shape is None else max(1.0, gcd(axes.sequence, shape.heads) / shape.kv_heads)
        return replace(
            layer, carry=round(layer.carry * copies), adjoint=round(layer.adjoint * copies),
            delivered_gradients=layer.delivered_gradients // shards, in_passes=None if layer.in_passes is None else spread(layer.in_passes),
        )  # fmt: skip

    known = {id(layer): spread(layer) for layer in model.layers}
    return replace(
        model, layers=tuple(known[id(layer)] for layer in model.layers), parameters=model.parameters // shards,
        trained=model.trained // shards, optimizer=states, sharded=True,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Between:
    """What a device receives from others in a step: bytes, and seconds that its compute does not hide."""

    received: float = 0.0
    seconds: float = 0.0
    ways: str = ""


def between(model: ModelFootprint, plan: Plan, axes: Axes, tokens: int, batch: int, rates: Rates, compute: float) -> Between:
    """Of whole sequences of `tokens` in chunks of ``plan.chunk_tokens``. Exchanges of a sequence are waited for; gathers of parameters
    (forward and backward) and the scattering of float32 gradients go on beside `compute` seconds."""
    sequence, ways = 0.0, set()
    if axes.sequence > 1:
        for layer in model.at(plan.chunk_tokens):
            if (shape := shape_of(layer, model)) is not None:
                heads = gcd(axes.sequence, shape.heads)
                found = choose(shape, tokens, heads=heads, ring=axes.sequence // heads, chunks=-(-tokens // plan.chunk_tokens),
                               segment_layers=plan.segment_layers, blocks=plan.kv_block_tokens is not None)  # fmt: skip
                sequence += found.costs[found.way].total * batch
                ways.add(found.way)
    share = (axes.devices - 1) / axes.devices
    sharded = (2 * model.parameters + 4 * model.trained) * share
    seconds = sequence / rates.link + max(0.0, sharded / rates.link - compute)
    return Between(received=sequence + sharded, seconds=seconds, ways=", ".join(sorted(ways)))
