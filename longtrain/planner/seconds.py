"""How long a step takes, from shapes alone: the formulas, part by part.

For each layer, n = B T tokens in m chunks of C, of its `Work` (longtrain.stream.work: counted a token, F forward, M up to its mixer, G
backward), with P(w) = sum over products of FLOP / rate at their size + moved / bytes a second, launch = calls a chunk:

    forward    n P(F) + m launch(F)                    + A
    backward   n P(F + G) + m launch(F + G) + 3 gradients m / bytes a second + 2.5 A
    again      (1 - b)^2 A                             one document; (1 - b) A under a window; b: share of outputs stored
    restored   (1 - s) (n P + m launch)(F of the segment's first k - 1 layers, M of its last)      s: share of K/V stored
    A          4 H D FLOP for each visible pair / attention rate at D; 2.5 A runs at the backward rate
    loss       3 x 2 E V FLOP a token / rate at E, 5 x 4 V bytes a token
    optimizer  28 bytes a parameter moved, 12 more for norm and clipping, 6 more where the model's weights are copies

A stretch of the step (a segment's forward or backward pass) takes the longer of its compute and its transfers; what the transfers are
longer by is `exposed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from longtrain.plan import STAY, Plan
from longtrain.planner.cost import ModelFootprint
from longtrain.planner.rates import Rates
from longtrain.span import chunk_spans
from longtrain.stream.footprint import LayerFootprint
from longtrain.stream.work import Work

ADAMW, NORM_AND_CLIP, COPY = 28, 12, 6
"""Bytes a parameter that an update reads and writes: weight, gradient and two moments in, weight and moments out; gradients twice in and
once out; a float32 weight in and a bf16 one out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSeconds:
    """Of one layer in a step."""

    forward: float
    backward: float
    """Without attention that is computed again and what is restored."""
    attention: float
    """One forward pass of it: what stored outputs save."""
    whole: float
    """Token-local forward pass: what restoring costs of a segment's layers but its last."""
    to_mix: float
    """What it costs of the last."""


def attention_flops(layer: LayerFootprint, model: ModelFootprint, tokens: int, chunk: int) -> float:
    """Of one forward pass over one sequence: two products of 2 H D FLOP for each (query, key) that is visible. 0 where nothing attends."""
    if not layer.lse:
        return 0.0
    head_elements = (layer.output - layer.lse) / model.dtype.itemsize / len(layer.mixers)
    pairs = 0.0
    for mixer in layer.mixers:
        for span in chunk_spans(tokens, chunk):
            keys = len(mixer.keys_for(span)) - len(span) / 2 if layer.causal and hasattr(mixer, "keys_for") else tokens
            pairs += keys * len(span)
    return 4 * head_elements * pairs


def layer_seconds(model: ModelFootprint, tokens: int, batch: int, chunk: int, rates: Rates, devices: int = 1) -> list[LayerSeconds]:
    """Of each layer on each of `devices` that share the sequences: `tokens` and `chunk` are what one of them has of a sequence."""
    layers, known = model.at(chunk), {}
    for layer in layers:
        if id(layer) not in known:
            known[id(layer)] = _of_layer(layer, model, tokens, batch, min(chunk, tokens), rates, devices)
    return [known[id(layer)] for layer in layers]


def _of_layer(
    layer: LayerFootprint, model: ModelFootprint, tokens: int, batch: int, chunk: int, rates: Rates, devices: int
) -> LayerSeconds:
    chunks, n = -(-tokens // chunk), tokens * batch
    spent = lambda work: n * token_seconds(work, rates) + chunks * work.calls * rates.launch
    flops = attention_flops(layer, model, tokens * devices, chunk * devices) / devices * batch
    dim = head_dim(layer, model)
    attention = flops / rates.at(rates.attention, dim)
    forward, sums = spent(layer.forward), 3 * layer.parameter_gradients * chunks / rates.moved
    return LayerSeconds(
        forward=forward + attention,
        backward=forward + spent(layer.backward) + sums + 2.5 * flops / rates.at(rates.attention_backward, dim),
        attention=attention,
        whole=forward,
        to_mix=spent(layer.to_mix),
    )


def token_seconds(work: Work, rates: Rates) -> float:
    return sum(flops / rates.at(rates.products, size) for size, flops in work.products) + work.moved / rates.moved


def head_dim(layer: LayerFootprint, model: ModelFootprint) -> float:
    """D, of heads whose LSE is 4 bytes each."""
    return (layer.output - layer.lse) / model.dtype.itemsize / (layer.lse / 4) if layer.lse else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step by part, and what they are of."""

    parts: dict[str, float]
    model_flops: float
    """What the model needs, nothing counted twice: 6 a matrix parameter and token, 12 H D a visible pair."""
    done_flops: float
    """What is done, with replays and what is computed again."""
    moved: dict[str, tuple[float, float]]
    """By tier: bytes written and read."""
    received: float = 0.0
    """Bytes that a device receives from others."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def step_time(
    model: ModelFootprint, plan: Plan, tokens: int, batch: int, rates: Rates, *, optimizer: str = "device", devices: int = 1
) -> StepTime:
    """Of one forward and backward pass over `batch` x `tokens`, and one update of the optimizer's ("device", "host" or "none"). Of
    `devices` that share the sequences one is looked at; `tokens` and the chunk are its own."""
    layers, k, n = model.at(plan.chunk_tokens), plan.segment_layers, tokens * batch
    chunk = min(plan.chunk_tokens, tokens)
    seconds = layer_seconds(model, tokens, batch, chunk, rates, devices)
    parts = dict.fromkeys(("token-local", "attention", "attention again", "restored", "loss", "exposed transfers", "optimizer"), 0.0)
    done = model_flops = 0.0
    compute: list[float] = []
    segments = [range(a, min(a + k, len(layers))) for a in range(0, len(layers), k)]
    for s in segments:
        compute.append(sum(seconds[i].forward for i in s))
    for s in segments:
        spent = 0.0
        for i in s:
            again = attention_again(layers[i], len(plan.stored_outputs(i, tokens)) / tokens, tokens, chunk) * seconds[i].attention
            parts["attention again"] += again
            spent += seconds[i].backward + again
        back = restored_seconds(seconds, plan, s, tokens)
        parts["restored"] += back
        compute.append(spent + back)
    for i, layer in enumerate(layers):
        attention = attention_flops(layer, model, tokens * devices, chunk * devices) / devices * batch
        share = attention_again(layer, len(plan.stored_outputs(i, tokens)) / tokens, tokens, chunk)
        own = seconds[i]
        backward_attention = 2.5 * attention / rates.at(rates.attention_backward, head_dim(layer, model)) if attention else 0.0
        parts["attention"] += own.attention + backward_attention
        parts["token-local"] += own.forward + own.backward - own.attention - backward_attention
        model_flops += 3 * (layer.forward.flops * n + attention)
        done += (2 * layer.forward.flops + layer.backward.flops) * n + (3.5 + share) * attention
    if model.vocab_size:
        head = 6 * model.width * model.vocab_size * n
        parts["loss"] = head / rates.at(rates.products, min(model.width, model.vocab_size)) + 20 * model.vocab_size * n / rates.moved
        model_flops, done = model_flops + head, done + head
    transfers, moved = transfer_seconds(model, plan, tokens, batch, rates, segments)
    parts["exposed transfers"] = sum(max(0.0, t - c) for t, c in zip(transfers, compute, strict=True))
    parts["optimizer"] = optimizer_seconds(model, rates, optimizer)
    return StepTime(parts=parts, model_flops=model_flops, done_flops=done, moved=moved)


def attention_again(layer: LayerFootprint, stored: float, tokens: int, chunk: int) -> float:
    """Of attention's forward pass, the share that is computed again where the last `stored` of the outputs are kept."""
    full = layer.carry_tokens(tokens, chunk) >= tokens
    return (1 - stored) ** 2 if full and layer.causal else 1 - stored


def restored_seconds(seconds: Sequence[LayerSeconds], plan: Plan, segment: range, tokens: int) -> float:
    """Of restoring a segment's keys and values where they were not kept."""
    missing = max(1 - len(plan.stored_kv(i, tokens)) / tokens for i in segment)
    return missing * (sum(seconds[i].whole for i in segment[:-1]) + seconds[segment[-1]].to_mix)


def optimizer_seconds(model: ModelFootprint, rates: Rates, where: str) -> float:
    """Of an AdamW update on float32 weights. On the host it works as gradients arrive and weights return."""
    if where == "none":
        return 0.0
    bytes_each = ADAMW + NORM_AND_CLIP + (COPY if model.dtype.itemsize < 4 else 0)
    if where == "device":
        return model.trained * bytes_each / rates.optimizer
    back = model.dtype.itemsize
    return model.trained * max(bytes_each / rates.host_optimizer, 4 / rates.host_write + back / rates.host_read)


def transfer_seconds(
    model: ModelFootprint, plan: Plan, tokens: int, batch: int, rates: Rates, segments: Sequence[range]
) -> tuple[list[float], dict[str, tuple[float, float]]]:
    """Seconds that the transfers of each stretch take (forward of every segment, then backward), and bytes (written, read) by tier."""
    layers, S, n = model.at(plan.chunk_tokens), len(segments), tokens * batch
    spent, moved = [0.0] * (2 * S), {"host": Counter(), "disk": Counter()}
    if plan.offload is None:
        return spent, {}

    def move(what: str, layer: int, size: float, stretch: int, writes: int, reads: int) -> None:
        split = plan.offload.split(what, layer)
        for tier, share in (("host", split.host), ("disk", split.disk)):
            if split != STAY and share > 0:
                spent[stretch] += size * share * (writes / rates.write(tier) + reads / rates.read(tier))
                moved[tier]["written"] += size * share * writes
                moved[tier]["read"] += size * share * reads

    for j, s in enumerate(segments):
        restores = any(len(plan.stored_kv(i, tokens)) < tokens for i in s)
        size = layers[s[0]].x * n
        move("inputs", s[0], size, max(j - 1, 0), 1, 0)
        move("inputs", s[0], size, j, 0, 1)
        move("inputs", s[0], size, S + j, 0, 1 + restores)
        move("gradients", s[-1] + 1, size, S + j, 1, 1)
        for i in s:
            f = layers[i]
            kept = len(f.kept_outputs(plan.stored_outputs(i, tokens), plan.chunk_tokens)) / tokens
            slides = f.causal and f.carry_tokens(tokens, plan.chunk_tokens) < tokens
            kv = 1.0 if slides else len(plan.stored_kv(i, tokens)) / tokens
            move("outputs", i, f.output * n * kept, j, 1, 0)
            move("outputs", i, f.output * n * kept, S + j, 0, 1)
            move("kv", i, f.carry * n * kv, j, 1, 0)
            move("kv", i, f.carry * n * kv, S + j, 0, 1)
    return spent, {tier: (of["written"], of["read"]) for tier, of in moved.items() if of}
