"""What would make a block of memory smaller: the setting that does it, and the one sentence at the top of a report."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from longtrain.memory.table import gib
from longtrain.plan import SPLITS, Offload, Plan, Split
from longtrain.planner.asked import CHUNKS, FRACTIONS, SEGMENTS, Asked
from longtrain.planner.cost import peak, step_memory
from longtrain.planner.footprint import ModelFootprint
from longtrain.planner.machines import memory_of
from longtrain.planner.rates import usual_rates
from longtrain.planner.search import fastest_plan
from longtrain.planner.seconds import step_time
from longtrain.planner.smallest import longest
from longtrain.planner.tiers import tier_use
from longtrain.units import GIB

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


def changes_that_fit(
    model: ModelFootprint, plan: Plan | None, tokens: int, room: int, *, taken: int = 0, tiers: Offload | None = None, devices: int = 1,
    planned: bool = False,
) -> list[str]:  # fmt: skip
    """The three cheapest single changes of a config whose predicted peak fits `room` bytes beside the `taken` ones, cheapest in step time
    first. `plan`: None where nothing is streamed; `planned`: it was made for memory.budget, in whose place there are no settings to change.
    `tokens` and chunk are those of one of `devices` that share the sequence.

    A shorter sequence and more memory come last, since they change what is trained or what is bought.
    """
    asked = Asked(model, tokens, 1, tiers, usual_rates(model.device), 1, devices)
    if plan is None or planned:
        texts = [f"memory.budget: {floor_gib(room + taken)}GiB"] if fastest_plan(asked, room) is not None else []
        shorter = longest(asked, room)
    else:
        seconds = lambda p: step_time(model, p, tokens, 1, asked.rates, devices=devices).total
        fits = lambda p: asked.peak(p) <= room and replace(asked, tiers=p.offload).fits_tiers(p)
        fitting = [[(seconds(p), asked.peak(p), text) for p, text in group if fits(p)] for group in single_changes(asked, plan)]
        texts = [text for _, _, text in sorted(min(group) for group in fitting if group)]
        shorter = bisect_right(range(1, tokens), room, key=lambda n: peak(step_memory(model, plan, n, slow_tiers=True)).total)
    if shorter:
        texts.append(f"data.seq_len: {shorter * devices} (now {tokens * devices})")
    if plan is not None:
        texts.append(f"more memory: this plan is predicted to take {gib(asked.peak(plan) + taken)} GiB")
    return texts[:3]


def single_changes(asked: Asked, plan: Plan) -> list[list[tuple[Plan, str]]]:
    """The plans that differ from `plan` in one setting, by setting, and what the config would say."""
    model, offload, c = asked.model, plan.offload, plan.chunk_tokens
    together = model.alike and all(f.causal for f in model.at(c))

    def changed(name: str, values: Iterable, times: int = 1) -> list[tuple[Plan, str]]:
        now = getattr(plan, name)
        return [(replace(plan, **{name: v}), f"memory.{name}: {v * times} (now {now * times})") for v in values]

    lower = lambda share: [f for f in FRACTIONS if not isinstance(share, tuple) and f < share]
    found = [
        changed("chunk_tokens", [n for n in CHUNKS if n < c and (plan.kv_block_tokens or n) % n == 0], asked.devices),
        changed("store_outputs", lower(plan.store_outputs)),
        changed("store_kv", lower(plan.store_kv)),
        changed("segment_layers", [k for k in SEGMENTS if k != plan.segment_layers and k <= len(model.layers) and (k == 1 or together)]),
    ]
    if offload is None and model.device.type == "cuda":
        offload = Offload(host_bytes=memory_of(torch.device("cpu")))
    for what in SPLITS if offload is not None else ():
        if any(offload.split(what, layer).device > 0 for layer in range(len(model.layers))):
            tier = "host" if offload.host_bytes else "disk"
            moved = replace(plan, offload=replace(offload, **{what: Split(host=float(tier == "host"))}))
            held = tier_use(model, moved, asked.tokens)[tier].held
            room = "" if plan.offload else f", with memory.host_budget: {floor_gib(held * 1.02 + GIB / 1000)}GiB"
            found.append([(moved, f"memory.offload.{what}: {tier}{room}")])
    return found


def floor_gib(size: float) -> str:
    """As a setting has it."""
    return f"{int(1000 * size / GIB) / 1000:.3f}"
