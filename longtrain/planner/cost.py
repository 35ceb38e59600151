"""The cost model: memory of a streamed step by phase, and its compute relative to one that recomputes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from longtrain.nn.ends import TokenLoss
from longtrain.ops.linear_cross_entropy import default_chunk_tokens, footprint_bytes
from longtrain.plan import Plan
from longtrain.planner.pretrained import layers_differ, probe_transformers
from longtrain.stream.footprint import LayerFootprint, probe_layer
from longtrain.stream.protocol import StreamableLayer

CHUNK_OVERHEAD_TOKENS = 40
"""A chunk costs about as much time as this many more tokens would: launches, sums of weight gradients (tools/bench_step.py)."""

CPU_WORKSPACE = 112 * 2**20
"""Resident memory of a CPU step that no tensor accounts for: kernel scratch, thread pools, freed blocks that the allocator keeps.
Measured: configs/quickstart.yaml peaked at 595 to 603 MiB where the tensors and what was held before add up to 486."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFootprint:
    """What the formulas need to know of a model. Bytes; `head_*` of the loss head, zero where the model has none of ours."""

    layers: tuple[LayerFootprint, ...]
    parameters: int
    other_gradients: int
    """Gradients of what is not in a layer: embedding, final norm, head."""
    optimizer: int
    vocab_size: int
    head_gradients: int
    width: int
    dtype: torch.dtype
    device: torch.device
    alike: bool = True
    """Whether all layers are given the same arguments, as those of one segment must be."""

    def at(self, chunk_tokens: int) -> tuple[LayerFootprint, ...]:
        """The layers in chunks of so many tokens."""
        return tuple(layer.at(chunk_tokens) for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Phase:
    """One moment of the step and what is alive in it, in bytes."""

    name: str
    items: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.items.values())

    @property
    def largest(self) -> str:
        return max(self.items, key=self.items.get)


def measure_model(model: nn.Module, optimizer_bytes_per_parameter: int = 8) -> ModelFootprint:
    """Probe a model's layers and count its parameters. Raises ValueError when it has no layer that can be streamed."""
    layers = [
        layer
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(isinstance(m, StreamableLayer) for m in module)
        for layer in module
    ]
    footprints = list(map(probe_layer, layers))
    head = getattr(model, "lm_head", None) if any(isinstance(m, TokenLoss) for m in model.modules()) else None
    if not layers:
        layers, footprints, head = probe_transformers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers that can be streamed: see longtrain.stream.protocol.StreamableLayer")
    trainable = {id(p): p for p in model.parameters() if p.requires_grad}
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    others = [p for key, p in trainable.items() if key not in in_layers]
    first = next(model.parameters())
    return ModelFootprint(
        layers=tuple(footprints),
        parameters=sum(p.nbytes for p in model.parameters()),
        other_gradients=sum(p.nbytes for p in others),
        optimizer=optimizer_bytes_per_parameter * sum(p.numel() for p in trainable.values()),
        vocab_size=head.out_features if head is not None else 0,
        head_gradients=head.weight.numel() * 4 if head is not None and head.weight.requires_grad else 0,
        width=head.in_features if head is not None else 0,
        dtype=first.dtype,
        device=first.device,
        alike=not layers_differ(model),
    )


def step_memory(model: ModelFootprint, plan: Plan, tokens: int, batch: int = 1) -> list[Phase]:
    """Bytes alive on the device at the turning points of a step: the loss, and the backward pass of each segment, where peaks occur.

    At segment j's backward: the inputs of segments 0..j, what layers 0..j store, the gradient that comes in; what the carries of its k
    layers hold and their accumulators; the graph of one chunk through k layers; gradients of the head and of segments j.. (its own
    twice: the sums, and one chunk's). Of what the plan sends to other tiers only the share that stays counts, and the staging.
    """
    layers, k, n = model.at(plan.chunk_tokens), plan.segment_layers, tokens * batch
    chunk = min(plan.chunk_tokens, tokens)

    def stays(what: str, layer: int) -> float:
        return 1.0 if plan.offload is None else plan.offload.split(what, layer).device

    blocked = [in_blocks(f, plan, tokens) for f in layers]
    kept_kv = [
        f.carry * batch * (tokens if blocked[i] else len(plan.stored_kv(i, tokens))) * f.causal * stays("kv", i) for i, f in enumerate(layers)
    ]
    states = [f.state * batch * ((tokens - 1) // chunk) * stays("kv", i) for i, f in enumerate(layers)]
    kept_outputs = [len(f.kept_outputs(plan.stored_outputs(i, tokens), chunk)) for i, f in enumerate(layers)]
    stored = [kept_kv[i] + states[i] + f.output * batch * kept_outputs[i] * stays("outputs", i) for i, f in enumerate(layers)]
    fixed = {"parameters": model.parameters, "optimizer": model.optimizer}
    if model.device.type == "cpu":
        fixed["workspace"] = CPU_WORKSPACE
    if plan.offload is not None:
        fixed["staging"] = plan.offload.staging_bytes
    segments = [range(a, min(a + k, len(layers))) for a in range(0, len(layers), k)]
    inputs = [layers[s[0]].x * n * stays("inputs", s[0]) for s in segments]
    end, phases = len(layers), []
    if model.vocab_size:
        loss_chunk = plan.loss_chunk_tokens or default_chunk_tokens(model.vocab_size, model.device, model.dtype)
        logits = footprint_bytes(min(loss_chunk, n), model.vocab_size, model.width, model.dtype, device=model.device.type)
        hidden = layers[-1].x * n * (2 if plan.boundaries == "tensor" else max(stays("inputs", end), stays("gradients", end)))
        items = {"layer inputs": sum(inputs), "stored outputs and K/V": sum(stored), "hidden states and gradient": hidden}
        phases.append(Phase("loss", _whole({**fixed, **items, "logits of a chunk": logits, "gradients": model.head_gradients})))
    for j in reversed(range(len(segments))):
        own = [layers[i] for i in segments[j]]
        gradients = sum(layers[i].parameter_gradients for s in segments[j:] for i in s) + model.head_gradients
        if j == 0:
            gradients += model.other_gradients - model.head_gradients
        gradient = 2.0 if plan.boundaries == "tensor" else max(stays("gradients", segments[j][0]), stays("gradients", segments[j][-1] + 1))
        carries = 0
        for i in segments[j]:
            if blocked[i]:  # the block that is worked on, and the chunk's own; of the others' sums what the plan leaves on the device
                carries += layers[i].carry_bytes() * min(tokens, 2 * plan.kv_block_tokens) * batch + layers[i].adjoint * n * stays("kv", i)
                continue
            held = layers[i].carry_tokens(tokens, chunk)
            carries += layers[i].carry_bytes() * held * batch
            if held < tokens:  # the store has the rest, of which a part is counted as stored
                carries += layers[i].carry * n * stays("kv", i) - kept_kv[i]
        items = {
            "layer inputs": sum(inputs[: j + 1]),
            "stored outputs and K/V": sum(stored[: segments[j][-1] + 1]),
            "gradient of the hidden states": own[-1].x * n * gradient,
            "K/V and their gradients": carries,
            "graph of a chunk": (sum(f.graph for f in own) * chunk + max((w(chunk) for f in own for w in f.workspaces), default=0)) * batch,
            "gradients": gradients + sum(f.parameter_gradients for f in own),
        }
        phases.append(Phase(f"backward of layers {segments[j][0]} to {segments[j][-1]}", _whole({**fixed, **items})))
    return phases


def in_blocks(layer: LayerFootprint, plan: Plan, tokens: int) -> bool:
    """Whether the layer's keys and values lie in blocks in the store (`longtrain.stream.kv_blocks`)."""
    full = layer.causal and layer.lse > 0 and layer.carry_tokens(tokens, min(plan.chunk_tokens, tokens)) >= tokens
    return plan.kv_block_tokens is not None and full


def _whole(items: dict[str, float]) -> dict[str, int]:
    return {name: round(size) for name, size in items.items()}


def relative_time(plan: Plan, layers: int, tokens: int) -> float:
    """Step time in units of one that recomputes no attention in one chunk: orders plans, does not predict seconds.

    Attention A is weighed against the token-local part N as at long sequences, 2 : 1; a stored last fraction b of one document saves
    1 - (1 - b)^2 of the second attention forward. Keys and values that are not stored cost their projections again, and in segments of
    k layers the (k - 1) layers before the last one.
    """
    attention, local = 2.0, 1.0
    recomputed = sum((1 - len(plan.stored_outputs(i, tokens)) / tokens) ** 2 for i in range(layers)) / layers
    k, kv = plan.segment_layers, len(plan.stored_kv(0, tokens)) / tokens
    restored = (1 - kv) * (0.1 + 0.9 * (k - 1) / k)
    work = (3.5 + recomputed) * attention + (4.0 + restored) * local
    return work / (3.5 * attention + 4.0 * local) * (1 + CHUNK_OVERHEAD_TOKENS / min(plan.chunk_tokens, tokens))


def peak(phases: Sequence[Phase]) -> Phase:
    """The phase that decides."""
    return max(phases, key=lambda phase: phase.total)
