"""How long a step takes, from shapes alone: the formulas, part by part.

For each layer, n = B T tokens in m chunks of C, of its `Work` (longtrain.stream.work: counted a token, F forward, M up to its mixer, G
backward), with P(w) = sum over products of FLOP / rate at their size + over other operations of bytes / bytes a second of each, and
Q(w) = calls x launch + blocks of new memory by their size, of a chunk; all but products `slower` in a step:

    forward    n P(F) + m Q(F)                         + A
    backward   n P(F + G) + m Q(F + G) + 3 gradients m / bytes a second + A'
    again      (1 - b)^2 A                             one document; (1 - b) A under a window; b: share of outputs stored
    restored   (1 - s) (n P + m Q)(F of the segment's first k - 1 layers, M of its last)      s: share of K/V stored
    A          4 H D FLOP for each visible pair / attention rate at D, m calls, and what its carry copies; A' has 2.5 times the FLOP
               other mixers: the FLOP that they say they take, the quickest way (longtrain.ops.mixers, state_mixers: `work`)
    loss       n P + Q a part, of its own `Work`, in the parts whose logits exist at one time
    optimizer  28 bytes a parameter moved, 12 more for norm and clipping, 6 more where the model's weights are copies
    tiers      an extent that is handed over or taken back takes its time however small it is

A stretch of the step (a segment's forward or backward pass) takes the longer of its compute and its transfers; what the transfers are
longer by is `exposed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from longtrain.plan import STAY, Plan
from longtrain.planner.cost import in_blocks, loss_parts
from longtrain.planner.footprint import ModelFootprint
from longtrain.planner.rates import Rates
from longtrain.span import Span, chunk_spans
from longtrain.stream.footprint import LayerFootprint
from longtrain.stream.sliding import capacity
from longtrain.stream.work import Work

ADAMW, NORM_AND_CLIP, COPY = 28, 12, 6
"""Bytes a parameter that an update reads and writes: weight, gradient and two moments in, weight and moments out; gradients twice in and
once out; a float32 weight in and a bf16 one out."""

STRETCHES = 1024
"""Of a sequence, in each of which the keys that a query sees are taken to grow evenly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSeconds:
    """Of one layer in a step."""

    forward: float
    backward: float
    """Without mixing that is done again and what is restored."""
    mixing: float
    """One forward pass of attention, or of what is there in its place: what stored outputs save."""
    mixing_backward: float
    mixing_flops: float
    """Of the forward pass."""
    whole: float
    """Token-local forward pass: what restoring costs of a segment's layers but its last."""
    to_mix: float
    """What it costs of the last."""


def attention_flops(layer: LayerFootprint, model: ModelFootprint, tokens: int) -> float:
    """Of one forward pass over one sequence: two products of 2 H D FLOP for each (query, key) that is visible. 0 where nothing attends."""
    if not layer.lse:
        return 0.0
    head_elements = (layer.output - layer.lse) / model.dtype.itemsize / len(layer.mixers)
    pairs = 0.0
    for mixer in layer.mixers:
        for span in chunk_spans(tokens, -(-tokens // STRETCHES)):
            ends = (Span(span.start, span.start + 1), Span(span.stop - 1, span.stop))
            keys = [len(mixer.keys_for(end)) if layer.causal and hasattr(mixer, "keys_for") else tokens for end in ends]
            pairs += sum(keys) / 2 * len(span)
    return 4 * head_elements * pairs


def layer_seconds(model: ModelFootprint, tokens: int, batch: int, chunk: int, rates: Rates, devices: int = 1) -> list[LayerSeconds]:
    """Of each layer on each of `devices` that share the sequences: `tokens` and `chunk` are what one of them has of a sequence."""
    layers, known, rates = model.at(chunk), {}, rates.in_step(hidden_bytes(model, batch, min(chunk, tokens)))
    for layer in layers:
        if id(layer) not in known:
            known[id(layer)] = _of_layer(layer, model, tokens, batch, min(chunk, tokens), rates, devices)
    return [known[id(layer)] for layer in layers]


def hidden_bytes(model: ModelFootprint, batch: int, chunk: int) -> int:
    """Of a chunk."""
    return model.layers[0].x * batch * chunk


def _of_layer(
    layer: LayerFootprint, model: ModelFootprint, tokens: int, batch: int, chunk: int, rates: Rates, devices: int
) -> LayerSeconds:
    chunks, n = -(-tokens // chunk), tokens * batch
    spent = lambda work: n * token_seconds(work, rates) + chunks * chunk_seconds(work, chunk * batch, rates)
    flops = attention_flops(layer, model, tokens * devices) / devices * batch
    dim = head_dim(layer, model)
    calls = chunks * len(layer.mixers) * (layer.lse > 0)
    made = chunks * rates.new_memory([((layer.output, 0.0), 1)], chunk * batch)  # outputs; backward gradients of queries
    mixing = flops / rates.at(rates.attention, dim) + calls * rates.call(rates.attention_call, dim) + made
    mixing_backward = 2.5 * flops / rates.at(rates.attention_backward, dim) + calls * rates.call(rates.attention_backward_call, dim) + made
    stretch, times = (chunk, tokens / chunk * batch) if layer.causal else (tokens, batch)
    for ways in layer.mixing_work:
        (way_flops, seconds), (_, seconds_backward) = (
            min(
                ((of(stretch, backward=b) * times, of(stretch, backward=b) * times / rates.mixer(way, b)) for way, of in ways.items()),
                key=itemgetter(1),
            )
            for b in (False, True)
        )
        flops, mixing, mixing_backward = flops + way_flops, mixing + seconds, mixing_backward + seconds_backward
    into, out_of = carry_seconds(layer, tokens, batch, chunk, rates)
    mixing, mixing_backward = mixing + into, mixing_backward + out_of
    forward, sums = spent(layer.forward), 3 * layer.parameter_gradients * chunks / rates.moved
    return LayerSeconds(
        forward=forward + mixing,
        backward=forward + spent(layer.backward) + sums + mixing_backward,
        mixing=mixing,
        mixing_backward=mixing_backward,
        mixing_flops=flops,
        whole=forward,
        to_mix=spent(layer.to_mix),
    )


def token_seconds(work: Work, rates: Rates) -> float:
    return sum(flops / rates.product(*of) for of, flops in work.products) + sum(slope / rates.of(name) for name, (slope, _) in work.others)


def carry_seconds(layer: LayerFootprint, tokens: int, batch: int, chunk: int, rates: Rates) -> tuple[float, float]:
    """What an attention layer's carry copies (`longtrain.stream.sliding`), forward and backward: everything once into its buffers, and
    where these slide what is held once more into new memory and back whenever they are full; backward the gradient sums too, which begin as
    zeros of a chunk."""
    if not layer.lse:
        return 0.0, 0.0
    held = tokens - layer.first_key(Span(max(0, tokens - chunk), tokens), chunk)
    room, chunks = capacity(held, tokens) - held, -(-tokens // chunk)
    moves = 0 if held >= tokens else chunks / max(1, room // chunk)

    def seconds(size: int, zeros: bool) -> float:
        """Of two tensors, of keys and of values, which take so many bytes a token."""
        copied = 2 * size * (tokens + 2 * moves * held) * batch / rates.moved
        new = moves * rates.new_memory([((size / 2, 0.0), 2)], held * batch)
        return copied + new + zeros * chunks * rates.new_memory([((size / 2, 0.0), 2)], chunk * batch)

    return seconds(layer.carry, zeros=False), seconds(layer.carry, zeros=False) + seconds(layer.adjoint, zeros=moves > 0)


def chunk_seconds(work: Work, tokens: int, rates: Rates) -> float:
    """Of a chunk of so many tokens, beside `token_seconds`."""
    fixed = sum(constant / rates.of(name) for name, (_, constant) in work.others)
    return fixed + work.calls * rates.launch + rates.new_memory(work.made, tokens)


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
    rates = rates.in_step(hidden_bytes(model, batch, chunk))
    seconds = layer_seconds(model, tokens, batch, chunk, rates, devices)
    parts = dict.fromkeys(
        ("token-local", "attention", "other mixers", "mixed again", "restored", "loss", "handing over", "exposed transfers", "optimizer"),
        0.0,
    )
    done = model_flops = 0.0
    compute: list[float] = []
    segments = [range(a, min(a + k, len(layers))) for a in range(0, len(layers), k)]
    for s in segments:
        compute.append(sum(seconds[i].forward for i in s))
    for s in segments:
        spent = 0.0
        for i in s:
            again = mixed_again(layers[i], len(plan.stored_outputs(i, tokens)) / tokens, tokens, chunk) * seconds[i].mixing
            parts["mixed again"] += again
            spent += seconds[i].backward + again
        back = restored_seconds(layers, seconds, plan, s, tokens)
        parts["restored"] += back
        compute.append(spent + back)
    for i, layer in enumerate(layers):
        share = mixed_again(layer, len(plan.stored_outputs(i, tokens)) / tokens, tokens, chunk)
        own = seconds[i]
        parts["attention" if layer.lse else "other mixers"] += own.mixing + own.mixing_backward
        parts["token-local"] += own.forward + own.backward - own.mixing - own.mixing_backward
        model_flops += 3 * (layer.forward.flops * n + own.mixing_flops)
        done += (2 * layer.forward.flops + layer.backward.flops) * n + (3.5 + share) * own.mixing_flops
    if model.vocab_size:
        head = 6 * model.width * model.vocab_size * n
        part = loss_parts(model, plan, tokens, batch)[1]
        parts["loss"] = n * token_seconds(model.loss_work, rates) + n / part * chunk_seconds(model.loss_work, part, rates)
        model_flops, done = model_flops + head, done + head
    transfers, handed, moved = transfer_seconds(model, plan, tokens, batch, rates, segments)
    parts["handing over"] = sum(handed)
    compute = [c + h for c, h in zip(compute, handed, strict=True)]
    parts["exposed transfers"] = sum(max(0.0, t - c) for t, c in zip(transfers, compute, strict=True))
    parts["optimizer"] = optimizer_seconds(model, rates, optimizer)
    return StepTime(parts=parts, model_flops=model_flops, done_flops=done, moved=moved)


def mixed_again(layer: LayerFootprint, stored: float, tokens: int, chunk: int) -> float:
    """Of a mixer's forward pass, the share that is done again where the last `stored` of the outputs are kept."""
    full = layer.lse > 0 and layer.carry_tokens(tokens, chunk) >= tokens
    return (1 - stored) ** 2 if full and layer.causal else 1 - stored


def restored_seconds(
    layers: Sequence[LayerFootprint], seconds: Sequence[LayerSeconds], plan: Plan, segment: range, tokens: int
) -> float:
    """Of restoring a segment's keys and values where they were not kept."""
    missing = max(0.0 if in_blocks(layers[i], plan, tokens) else 1 - len(plan.stored_kv(i, tokens)) / tokens for i in segment)
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
) -> tuple[list[float], list[float], dict[str, tuple[float, float]]]:
    """Seconds that the transfers of each stretch take (forward of every segment, then backward), those in which compute waits while extents
    are handed over, and bytes (written, read) by tier."""
    layers, S, n, chunks = model.at(plan.chunk_tokens), len(segments), tokens * batch, -(-tokens // plan.chunk_tokens)
    spent, handed, moved = [0.0] * (2 * S), [0.0] * (2 * S), {"host": Counter(), "disk": Counter()}
    if plan.offload is None:
        return spent, handed, {}

    def move(what: str, layer: int, size: float, stretch: int, writes: float, reads: float, extents: float = 1) -> None:
        """`extents`: of a chunk."""
        split = plan.offload.split(what, layer)
        for tier, share in (("host", split.host), ("disk", split.disk)):
            if split != STAY and share > 0:
                spent[stretch] += size * share * (writes / rates.write(tier) + reads / rates.read(tier))
                handed[stretch] += chunks * extents * share * (writes + reads) * rates.handing_over
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
            with_lse = (1 + (f.lse > 0)) * kept
            move("outputs", i, f.output * n * kept, j, 1, 0, with_lse)
            move("outputs", i, f.output * n * kept, S + j, 0, 1, with_lse)
            if in_blocks(f, plan, tokens):  # each chunk meets all keys up to its own, and backward the sums of the blocks before its own
                of_a_block = plan.kv_block_tokens // plan.chunk_tokens
                keys, sums = (chunks + 1) / 2, max(0, chunks - of_a_block) / 2
                move("kv", i, f.carry * n, j, 1, keys, 2)
                move("kv", i, f.carry * n, S + j, 0, keys, 2)
                move("kv", i, f.adjoint * n, S + j, sums, sums, 2 / of_a_block)
                continue
            move("kv", i, f.carry * n * kv, j, 1, 0, 2 * kv)
            move("kv", i, f.carry * n * kv, S + j, 0, 1, 2 * kv)
    return spent, handed, {tier: (of["written"], of["read"]) for tier, of in moved.items() if of}
