"""What a step holds in the slower tiers and writes to them: every extent by its size, at the moments when most are there."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from longtrain.offload.disk import room
from longtrain.plan import SPLITS, Plan
from longtrain.planner.cost import in_blocks, restored_outputs
from longtrain.planner.footprint import ModelFootprint
from longtrain.span import Span, chunk_spans
from longtrain.units import format_bytes

FP8_SHARE = {2: 0.53, 4: 0.28, 8: 0.14}
"""Bytes of a compressed value with its share of a scale (4 bytes for 128 values), over those of the value, by its item size."""


@dataclass(frozen=True, slots=True)
class TierUse:
    """What a step takes of one tier, in bytes."""

    held: int
    """At most at one time."""
    written: int
    """In the whole step."""


def tier_use(model: ModelFootprint, plan: Plan, tokens: int, batch: int = 1) -> dict[str, TierUse]:
    """Use of "host" and "disk". Most is held when the loss begins, or when a segment's backward pass has restored its keys and values."""
    if plan.offload is None:
        return dict.fromkeys(("host", "disk"), TierUse(0, 0))
    layers, end = model.at(plan.chunk_tokens), len(model.layers)
    chunk = min(plan.chunk_tokens, tokens)
    spans = chunk_spans(tokens, chunk)

    def placed(what: str, layer: int, starts: range) -> Counter:
        """How many of the extents that begin at `starts` (rising) go to each slower tier: where one goes is decided by its first token."""
        split = plan.offload.split(what, layer)
        stay, host = (bisect_left(starts, round(share * tokens)) for share in (1 - split.device, split.disk))
        return Counter(host=max(0, stay - host), disk=min(host, stay))

    def extents(what: str, layer: int, token_bytes: Sequence[int], kept: Span, *, exact: Sequence[int] = ()) -> Counter:
        """Bytes by tier of tensors with `token_bytes` each (`exact`: never compressed), extent by extent: whole chunks, and what `kept`
        cuts."""
        factor = FP8_SHARE[model.dtype.itemsize] if plan.offload.split(what, layer).compress else 1
        first, last = -(-kept.start // chunk), kept.stop // chunk
        if not len(kept):
            return Counter()
        cut = [Span(kept.start, min(first * chunk, kept.stop)), Span(max(last * chunk, kept.start), kept.stop)] if first <= last else [kept]
        sizes = Counter()
        for starts, length in [
            (range(first * chunk, last * chunk, chunk), chunk),
            *((range(c.start, c.stop, tokens), len(c)) for c in cut if len(c)),
        ]:
            size = sum(room(round(b * factor) * length * batch) for b in token_bytes) + sum(room(b * length * batch) for b in exact if b)
            for tier, count in placed(what, layer, starts).items():
                sizes[tier] += size * count
        return sizes

    def states(layer: int) -> Counter:
        """Bytes by tier of the entry states, one for every chunk but the first."""
        if not layers[layer].state:
            return Counter()
        size = room(layers[layer].state * batch)
        return Counter({tier: size * count for tier, count in placed("kv", layer, range(chunk, tokens, chunk)).items()})

    def block_sums(layer: int) -> tuple[Counter, Counter]:
        """Bytes by tier of the gradient sums of K/V in blocks: held at most, and written, once for every later block's chunk."""
        split, held, written = plan.offload.split("kv", layer), Counter(), Counter()
        for block in chunk_spans(tokens, plan.kv_block_tokens):
            later = sum(span.start >= block.stop for span in spans)
            if later and (tier := split.place(block, tokens).tier) != "device":
                size = 2 * room(layers[layer].adjoint // 2 * len(block) * batch)
                held[tier] += size
                written[tier] += later * size
        return held, written

    whole = Span(0, tokens)
    starts = [*range(0, end, plan.segment_layers), end] if plan.boundaries == "stream" else []
    inputs, gradients = ({i: extents(what, i, [layers[min(i, end - 1)].x], whole) for i in starts} for what in ("inputs", "gradients"))
    kept_outputs = [f.kept_outputs(plan.stored_outputs(i, tokens), chunk) for i, f in enumerate(layers)]
    of_outputs = lambda i, kept: extents("outputs", i, [layers[i].output - layers[i].lse], kept, exact=[layers[i].lse])
    outputs = [of_outputs(i, kept_outputs[i]) for i in range(end)]
    halves = [[f.carry // 2] * 2 for f in layers]
    blocked = [in_blocks(f, plan, tokens) for f in layers]
    kept_kv = [extents("kv", i, halves[i], whole if blocked[i] else plan.stored_kv(i, tokens)) + states(i) for i in range(end)]
    slides = [f.causal and f.carry_tokens(tokens, chunk) < tokens for f in layers]
    all_kv = [extents("kv", i, halves[i], whole) + states(i) if slides[i] else kept_kv[i] for i in range(end)]
    sums = [block_sums(i) if blocked[i] else (Counter(), Counter()) for i in range(end)]

    moments, restored = [_sum([*inputs.values(), *outputs, *kept_kv])], []
    for first in range(0, end, plan.segment_layers):
        after = min(first + plan.segment_layers, end)
        more = [of_outputs(i, kept) for i, kept in restored_outputs(layers, plan, range(first, after), tokens).items() if len(kept)]
        restored += more
        moments.append(_sum([
            *(size for i, size in inputs.items() if i <= first), *outputs[:after], *more, *kept_kv[:first], *all_kv[first:after],
            *(held for held, _ in sums[first:after]), gradients.get(after, Counter()),
        ]))  # fmt: skip
    written = _sum([*inputs.values(), *gradients.values(), *outputs, *restored, *all_kv, *(written for _, written in sums)])
    return {tier: TierUse(max(moment[tier] for moment in moments), written[tier]) for tier in ("host", "disk")}


def describe(model: ModelFootprint, plan: Plan, tokens: int, batch: int = 1, steps: int | None = None) -> list[str]:
    """Lines for a person: what leaves the device by kind and layer, what tiers hold, what a step and a run of `steps` write to the disk."""
    if plan.offload is None:
        return []
    lines = ["what leaves the device (share on the host, share on disk):"]
    for what in SPLITS:
        splits = [plan.offload.split(what, layer) for layer in range(len(model.layers))]
        starts = [i for i, split in enumerate(splits) if i == 0 or split != splits[i - 1]]
        for first, after in zip(starts, [*starts[1:], len(splits)], strict=True):
            split = splits[first]
            lossy = ", in FP8" if split.compress else ""
            lines.append(f"  {what:10} {split.host:.2f}  {split.disk:.2f}  layers {first} to {after - 1}{lossy}")
    uses, disk = tier_use(model, plan, tokens, batch), plan.offload.disk
    rooms = {"host": plan.offload.host_bytes, "disk": disk.budget if disk else 0}
    for tier, use in uses.items():
        if rooms[tier]:
            held = f"{format_bytes(use.held)} of {format_bytes(rooms[tier])}"
            lines.append(f"  {tier:10} holds at most {held}, {format_bytes(use.written)} written a step")
    if disk is not None:
        written = uses["disk"].written
        line = f"  disk wear  {written / 1e12:.4f} TB a step"
        line += f", {written * steps / 1e12:.2f} TB in {steps} steps" if steps else ""
        if disk.max_written is None:
            lines.append(line + "; no limit is set (memory.disk.max_written)")
        else:
            line += f", of {disk.max_written / 1e12:.2f} TB allowed (memory.disk.max_written)"
            most = disk.max_written // written if written else 0
            worn = steps and written * steps > disk.max_written
            lines.append(line + (f": reached after {most} steps, then what leaves goes no lower than host memory" if worn else ""))
    return lines


def _sum(sizes: Sequence[Counter]) -> Counter:
    return sum(sizes, Counter())
