"""What would make a block of memory smaller: the setting that does it, and the one sentence at the top of a report."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from longtrain.memory.table import gib
from longtrain.plan import Offload, Plan
from longtrain.planner.asked import CHUNKS, FRACTIONS, SEGMENTS, Asked
from longtrain.planner.cost import peak, step_memory
from longtrain.planner.footprint import ModelFootprint
from longtrain.planner.rates import usual_rates
from longtrain.planner.seconds import step_time
from longtrain.planner.smallest import longest
from longtrain.units import format_bytes

if TYPE_CHECKING:
    from longtrain.memory.ledger import Item

STREAM = "lt.apply(model, lt.Plan(chunk_tokens=...)): stream the layers and the loss"

ALWAYS = {
    "parameters": "train.dtype: bfloat16, or shard them over ranks (FSDP2)",
    "gradients": "shard them over ranks (FSDP2), or train fewer parameters (PEFT)",
    "optimizer": "an optimizer with smaller states, or shard it over ranks (FSDP2)",
    "staging": "memory.staging: smaller",
    "communication": "smaller buckets of DDP or FSDP2",
    "data": "shorter sequences, or fewer of them",
    "other": "let go of tensors that the step does not need",
    "unattributed": "",
}

STREAMED = {
    "carry": "memory.segment_layers: smaller, or a window on more layers",
    "activations": "memory.chunk_tokens: smaller",
    "workspace": "memory.chunk_tokens: smaller",
}

STORED = {
    "gradient of": "memory.offload.gradients: host or disk",
    "input of": "memory.segment_layers: larger, or memory.offload.inputs: host or disk",
    "mixer output": "memory.store_outputs: smaller, or memory.offload.outputs: host or disk",
    "LSE": "memory.store_outputs: smaller, or memory.offload.outputs: host or disk",
    "layer": "memory.store_kv: smaller, or memory.offload.kv: host or disk",
}
"""Of the token store's extents, by what their names hold; the first that fits."""


def remedy(item: Item, streamed: bool) -> str:
    """The setting that removes an item, or makes it smaller."""
    if item.category in ALWAYS:
        return ALWAYS[item.category]
    if not streamed:
        return STREAM
    if item.category == "activations" and (found := next((text for part, text in STORED.items() if part in item.name), None)):
        return found
    if "loss" in item.module or "linear_cross_entropy" in item.line or re.search(r"stream/(loss|head)\.py", item.line):
        return "memory.loss_chunk_tokens: smaller"
    return STREAMED.get(item.category, "")


def sentence(result: dict[str, Any]) -> str:
    """What the largest consumer is, and what to change."""
    top, items = result["peak"], result["peak"]["items"]
    if not items:
        return "No memory was seen to be taken."
    total, by_category = top["bytes"], top["by_category"]
    category, size = max(by_category.items(), key=lambda entry: entry[1])
    largest = next((item for item in items if item["category"] == category), items[0])
    text = (
        f"At its peak, in {top['phase']}, {gib(total)} GiB were held; the largest part is {category} ({gib(size)} GiB, "
        f"{size / max(total, 1):.0%}), above all {largest['name']}"
        + (f" in {largest['module']}" if largest["module"] else "")
        + f" ({gib(largest['bytes'])} GiB)"
    )
    if result.get("failure"):
        text = f"The program failed in {result['failure']['phase']}: {result['failure']['error']}. " + text
    over = f"; the budget of {gib(result['budget'])} GiB was exceeded" if result["over_budget"] else ""
    return text + over + (f". To change: {largest['remedy']}." if largest["remedy"] else ".")


def changes_that_fit(model: ModelFootprint, plan: Plan, tokens: int, room: int, batch: int = 1, tiers: Offload | None = None) -> list[str]:
    """The three cheapest single changes of `plan` whose predicted peak fits `room` bytes, cheapest in step time first.

    A shorter sequence and a larger budget come last, since they change what is trained or what is bought.
    """
    layers, rates = len(model.layers), usual_rates(model.device)
    seconds = lambda p: step_time(model, p, tokens, batch, rates).total

    def cheapest_that_fits(name: str, values) -> tuple[float, str] | None:
        tried = [replace(plan, **{name: value}) for value in values]
        fitting = [p for p in tried if peak(step_memory(model, p, tokens, batch)).total <= room]
        if not fitting:
            return None
        best = min(fitting, key=lambda p: (seconds(p), peak(step_memory(model, p, tokens, batch)).total))
        return seconds(best), f"memory.{name}: {getattr(best, name)} (now {getattr(plan, name)})"

    found = [
        cheapest_that_fits("chunk_tokens", [c for c in CHUNKS if c < plan.chunk_tokens and (plan.kv_block_tokens or c) % c == 0]),
        cheapest_that_fits("store_outputs", [f for f in FRACTIONS if not isinstance(plan.store_outputs, tuple) and f < plan.store_outputs]),
        cheapest_that_fits("store_kv", [f for f in FRACTIONS if not isinstance(plan.store_kv, tuple) and f < plan.store_kv]),
        cheapest_that_fits("segment_layers", [k for k in SEGMENTS if k != plan.segment_layers and k <= layers]),
    ]
    texts = [text for _, text in sorted(entry for entry in found if entry is not None)]
    shorter = longest(Asked(model, tokens, batch, tiers, rates, 1), room)
    if shorter:
        texts.append(f"data.seq_len: {shorter} (now {tokens}), with the plan that the planner makes for it")
    needed = peak(step_memory(model, plan, tokens, batch)).total
    texts.append(f"memory.budget: {format_bytes(needed)} beside what the process holds, for this plan")
    return texts[:3]
