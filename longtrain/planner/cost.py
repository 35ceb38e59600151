"""The cost model: memory of a streamed step by phase, from what layers, loss and plan say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longtrain.offload.system import System
from longtrain.offload.traffic import staging_rooms
from longtrain.ops.linear_cross_entropy import default_chunk_tokens
from longtrain.plan import STAY, Plan
from longtrain.planner.footprint import ModelFootprint
from longtrain.span import Span, chunk_spans
from longtrain.stream.footprint import LayerFootprint
from longtrain.stream.work import highest

CPU_WORKSPACE = 112 * 2**20
"""Resident memory of a CPU step that no tensor accounts for: kernel scratch, thread pools, freed blocks that the allocator keeps. Nearly
all of it is the last: where malloc keeps nothing back (MALLOC_MMAP_THRESHOLD_=65536) twenty steps took 1 to 12 MiB beside their tensors and
`extents_bytes` (tools/predicted_measured.py); as it is, configs/quickstart.yaml peaked at 595 to 603 MiB where the tensors and what was
held before add up to 486."""

EXTENT, TIERED_EXTENT, PAGE, MAPPED = 460, 1600, 4096, 1 << 16
"""Resident bytes of an extent of the token store beside its tensor, without tiers and with them (measured: 4,096 extents of a few bytes),
and the page that malloc adds to a block that it maps by itself, of so many bytes and more (MALLOC_MMAP_THRESHOLD_=65536)."""

GPU_WORKSPACE = 2 * 10**9
"""Of a GPU: the CUDA context, libraries' workspaces, and what the caching allocator cannot use (the design's "context" of 3 GB with
staging)."""

IDS = 3 * 8
"""Bytes a token of ids, labels and targets."""


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


def step_memory(model: ModelFootprint, plan: Plan, tokens: int, batch: int = 1, *, slow_tiers: bool = False) -> list[Phase]:
    """Bytes alive on the device at the turning points of a step: the loss, the backward pass of each segment and of the embedding.

    At segment j's backward, at its second chunk, when sums are there and the first chunk's outputs are done with: the inputs of segments
    0..j, what layers 0..j store and what restoring adds to it, the gradient that comes in;
    what the carries of its k layers hold and their accumulators; the graph of one chunk through k layers, with that chunk's parameter
    gradients; gradients of the head and of later segments as they were delivered, its own as they are added up. Of what the plan sends to
    other tiers only the share that stays counts, and what is on its way: what is fetched ahead, and the chunk that is being written
    (`slow_tiers`: all that staging lets writes take, as a budget must allow for).
    """
    layers, k, n = model.at(plan.chunk_tokens), plan.segment_layers, tokens * batch
    chunk = min(plan.chunk_tokens, tokens)

    def stays(what: str, layer: int) -> float:
        return 1.0 if plan.offload is None else plan.offload.split(what, layer).device

    blocked = [in_blocks(f, plan, tokens) for f in layers]
    kept_kv = [
        f.carry * batch * (tokens if blocked[i] else len(plan.stored_kv(i, tokens))) * f.causal * stays("kv", i)
        for i, f in enumerate(layers)
    ]
    states = [f.state * batch * ((tokens - 1) // chunk) * stays("kv", i) for i, f in enumerate(layers)]
    kept_outputs = [f.kept_outputs(plan.stored_outputs(i, tokens), chunk) for i, f in enumerate(layers)]
    outputs = [f.output * batch * len(kept_outputs[i]) * stays("outputs", i) for i, f in enumerate(layers)]
    stored = [kept_kv[i] + states[i] + outputs[i] for i in range(len(layers))]
    slides = [f.causal and f.carry_tokens(tokens, chunk) < tokens for f in layers]
    fixed = {
        "parameters": model.parameters,
        "optimizer": model.optimizer,
        "ids, labels, positions": (IDS + max(f.arguments for f in layers)) * n,
    }
    slab, half = (
        (0, 0) if plan.offload is None else staging_rooms(plan.offload.staging_bytes, plan.offload.disk is not None, System().threads)[1:]
    )
    on_cpu = CPU_WORKSPACE + slab + extents_bytes(model, plan, tokens, batch)
    fixed["workspace"] = on_cpu if model.device.type == "cpu" else GPU_WORKSPACE  # a GPU's slab is the host's memory
    segments = [range(a, min(a + k, len(layers))) for a in range(0, len(layers), k)]
    inputs = [layers[s[0]].x * n * stays("inputs", s[0]) for s in segments]
    end, phases, several = len(layers), [], tokens > chunk
    second = chunk_spans(tokens, chunk)[-2:][0]  # of the backward pass

    def staging(fetched: float, x: int, stay: float, under_way: bool) -> dict[str, float]:
        """`under_way`: whether the chunk of x that was just made leaves; the last tokens are those that `stay`."""
        written = x * n * (1 - stay) if slow_tiers else x * chunk * batch * under_way
        return {"staging": min(half, fetched) + min(half, written)} if half else {}

    streams = plan.boundaries == "stream"
    if model.vocab_size:
        loss_chunk, part = loss_parts(model, plan, tokens, batch)
        x = layers[-1].x
        hidden = x * n * (max(stays("inputs", end), stays("gradients", end)) + model.norm_is_layer * stays("inputs", end) if streams else 2)
        logits = highest(model.loss, part) + (x * max(0, chunk * batch - part) if streams else -x * part)
        if model.norm_is_layer and n <= loss_chunk:  # few enough for ordinary ones (`longtrain.hf.head`): log-softmax, its gradient, theirs
            logits = 3 * 4 * model.vocab_size * n
        items = {
            "layer inputs": sum(inputs), "stored outputs and K/V": sum(stored), "hidden states and gradient": hidden,
            "logits of a chunk": logits, "gradients": model.head_gradients, "parameters": model.parameters + gathered_bytes(model),
            **staging(x * n * (1 - stays("inputs", end)), x, stays("gradients", end), stays("gradients", end) < 1),
        }  # fmt: skip
        phases.append(Phase("loss", _whole({**fixed, **items})))
    for j in reversed(range(len(segments))):
        s = segments[j]
        own, later = [layers[i] for i in s], [i for t in segments[j + 1 :] for i in t]
        delivered = sum(layers[i].delivered_gradients for i in later) + model.head_delivered
        gradient = max(stays("gradients", s[0]), stays("gradients", s[-1] + 1)) if streams else 2.0
        carries, keeps = 0.0, sum(stored[: s[0]])
        restored = restored_outputs(layers, plan, s, tokens)
        for i in s:
            kept = (
                len(kept_outputs[i])
                + len(restored.get(i, ()))
                - (chunk if several and kept_outputs[i].stop - kept_outputs[i].start >= chunk else 0)
            )
            keeps += states[i] + layers[i].output * batch * kept * stays("outputs", i)
            if blocked[i]:  # the block that is worked on, and the chunk's own; of the others' sums what the plan leaves on the device
                carries += layers[i].carry_bytes() * min(tokens, 2 * plan.kv_block_tokens) * batch + layers[i].adjoint * n * stays("kv", i)
                keeps += kept_kv[i]
                continue
            held = layers[i].carry_tokens(tokens, chunk) * batch
            carries += (layers[i].carry_bytes() - (0 if several else layers[i].adjoint)) * held
            if slides[i]:  # the store has what came before the first key that the second chunk sees
                taken = (tokens - layers[i].first_key(second, chunk)) * batch
                keeps += layers[i].carry * max(0.0, n * stays("kv", i) - taken)
        away = sum(layers[i].output * batch * len(kept_outputs[i]) * (1 - stays("outputs", i)) for i in s) + own[0].x * n * (
            1 - stays("inputs", s[0])
        )
        away += own[-1].x * n * (1 - stays("gradients", s[-1] + 1))
        items = {
            "parameters": model.parameters + gathered_bytes(model, segments, j),
            "layer inputs": sum(inputs[: j + 1]),
            "stored outputs and K/V": keeps,
            "gradient of the hidden states": own[-1].x * n * gradient,
            "K/V and their gradients": carries,
            "graph of a chunk": chunk_graph(
                own, chunk, batch, [len(kept_outputs[i]) + len(restored.get(i, ())) < min(2 * chunk, tokens) for i in s], several
            ),
            "gradients": delivered + sum(f.parameter_gradients for f in own) * several + scattered_bytes(model, segments, j),
            **staging(away, own[0].x, stays("gradients", s[0]), stays("gradients", s[0]) == 0),
        }
        phases.append(Phase(f"backward of layers {s[0]} to {s[-1]}", _whole({**fixed, **items})))
    if model.embedding_sums:
        delivered = sum(f.delivered_gradients for f in layers) + model.other_gradients
        items = {
            "parameters": model.parameters + gathered_bytes(model),
            "gradient of the hidden states": layers[0].x * n * stays("gradients", 0),
            "gradients": delivered + model.embedding_sums + scattered_bytes(model, segments, -1),
        }
        phases.append(Phase("backward of the embedding", _whole({**fixed, **items})))
    return phases


def extents_bytes(model: ModelFootprint, plan: Plan, tokens: int, batch: int = 1) -> int:
    """What the extents of the token store take of a CPU's resident memory beside their tensors, when the backward pass begins."""
    layers, chunk, k = model.at(plan.chunk_tokens), min(plan.chunk_tokens, tokens), plan.segment_layers
    chunks, of_an_extent = -(-tokens // chunk), EXTENT if plan.offload is None else TIERED_EXTENT

    def of(what: str, layer: int, bytes_a_token: float, count: float) -> float:
        stays = 1.0 if plan.offload is None else plan.offload.split(what, layer).device
        return count * (of_an_extent + stays * PAGE * (bytes_a_token * chunk * batch >= MAPPED))

    total = sum(of("inputs", i, layers[i].x, chunks) for i in range(0, len(layers), k))
    for i, f in enumerate(layers):
        outputs = len(f.kept_outputs(plan.stored_outputs(i, tokens), chunk)) / chunk
        total += of("outputs", i, f.output - f.lse, outputs) + (of("outputs", i, f.lse, outputs) if f.lse else 0)
        slides = f.causal and f.carry_tokens(tokens, chunk) < tokens
        blocks = in_blocks(f, plan, tokens)
        in_chunks = slides or blocks or (plan.offload is not None and plan.offload.split("kv", i) != STAY)
        kept = tokens if blocks else len(plan.stored_kv(i, tokens))
        total += of("kv", i, f.carry / 2, 2 * kept / chunk) if in_chunks and f.carry else 0
    return round(total)


def gathered_bytes(model: ModelFootprint, segments: Sequence[range] = (), j: int = 0) -> int:
    """What FSDP2 holds whole where a model is sharded by segments of layers: from the forward pass to the end of the step its root's own
    parameters, which are all that is in no layer; while segment j runs backward its own, and as much again for the next one, or, of the
    last to run, for the buffer that they came in."""
    sizes = [sum(model.layers[i].parameters for i in segment) for segment in segments]
    return model.sharded * (model.outside + (sizes[j] + sizes[max(0, j - 1)] if sizes else 0))


def scattered_bytes(model: ModelFootprint, segments: Sequence[range], j: int) -> int:
    """The gradients of the segment that ran backward before segment j (-1: the embedding), whole, on their way to the devices that keep
    them: FSDP2 lets them go when the next are sent."""
    return model.sharded * sum(model.layers[i].parameter_gradients for segment in segments[j + 1 : j + 2] for i in segment)


def loss_parts(model: ModelFootprint, plan: Plan, tokens: int, batch: int) -> tuple[int, int]:
    """Tokens whose logits may exist at one time, and those that do."""
    most, n = plan.loss_chunk_tokens or default_chunk_tokens(model.vocab_size, model.device, model.dtype), tokens * batch
    return most, min(most, n, min(plan.chunk_tokens, tokens) * batch if plan.boundaries == "stream" else n)


def chunk_graph(layers: Sequence[LayerFootprint], chunk: int, batch: int, mixes: Sequence[bool], several: bool) -> float:
    """Most that replay and backward pass of one chunk through consecutive layers hold: the graphs of the layers before one, the highest
    moment of its own, parameter gradients of those after it. `mixes`: whose outputs are computed again, and so are new. Where there are not
    `several` chunks, gradients of keys and values begin only when the mixer is differentiated."""
    tokens = chunk * batch
    before, most = 0.0, 0.0
    after = sum(f.chunk_gradients for f in layers)
    for layer, new in zip(layers, mixes, strict=True):
        out = layer.output * tokens * new
        after -= layer.chunk_gradients
        mixing = layer.mixing_bytes(tokens) + (0 if several else layer.adjoint * tokens)
        most = max(most, before + out + max(layer.graph_bytes(tokens), mixing) + after)
        before += layer.saved_bytes(tokens) + out
    return most


def restored_outputs(layers: Sequence[LayerFootprint], plan: Plan, segment: range, tokens: int) -> dict[int, Span]:
    """The tokens of each layer whose outputs the restoring pass must compute, and so stores (`stream.causal._restore`): of the layers
    before the last one whose keys and values were not all kept, as far as anything is restored."""
    chunk = min(plan.chunk_tokens, tokens)

    def missing(i: int) -> int:
        whole = in_blocks(layers[i], plan, tokens) or not layers[i].causal or (layers[i].state and not layers[i].carry)
        return 0 if whole else plan.stored_kv(i, tokens).start

    stops = {i: missing(i) for i in segment}
    last = max((i for i in segment if stops[i]), default=segment[0])
    restored = min(tokens, -(-max(stops.values()) // chunk) * chunk)
    return {i: Span(0, min(restored, layers[i].kept_outputs(plan.stored_outputs(i, tokens), chunk).start)) for i in segment if i < last}


def in_blocks(layer: LayerFootprint, plan: Plan, tokens: int) -> bool:
    """Whether the layer's keys and values lie in blocks in the store (`longtrain.stream.kv_blocks`)."""
    full = layer.causal and layer.lse > 0 and layer.carry_tokens(tokens, min(plan.chunk_tokens, tokens)) >= tokens
    return plan.kv_block_tokens is not None and full


def _whole(items: dict[str, float]) -> dict[str, int]:
    return {name: round(size) for name, size in items.items()}


def peak(phases: Sequence[Phase]) -> Phase:
    """The phase that decides."""
    return max(phases, key=lambda phase: phase.total)
