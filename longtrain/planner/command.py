"""`longtrain plan CONFIG`: the plan for a config's budget, and what it is predicted to hold, phase by phase."""

from __future__ import annotations

from collections.abc import Sequence

from longtrain.config import load_config
from longtrain.planner.cost import measure_model, peak, step_memory
from longtrain.planner.search import held_beside_model
from longtrain.planner.tiers import describe
from longtrain.train.prepare import build_model, make_plan, step_count
from longtrain.units import format_bytes


def run(config_path: str, overrides: Sequence[str]) -> int:
    """Print the plan and its memory table. Exit code 0; a budget that nothing fits is the config's error."""
    config, where = load_config(config_path, overrides)
    model, *_ = build_model(config, where, read_weights=False)
    tokens = config.data.seq_len
    chosen = make_plan(model, config, where)
    if chosen is None:
        raise where.error("memory", "neither memory.budget nor memory.chunk_tokens is set, so nothing is streamed; set one of them")
    try:
        footprint = measure_model(model)
    except ValueError as error:
        raise where.error("model", f"{error}; train it without the section memory") from None
    phases = step_memory(footprint, chosen, tokens)
    taken = held_beside_model(footprint)
    print(f"{tokens} tokens in chunks of {chosen.chunk_tokens}; segments of {chosen.segment_layers} layers")
    print(f"outputs stored {chosen.store_outputs}, K/V stored {chosen.store_kv}, boundaries: {chosen.boundaries}\n")
    width = max(len(phase.name) for phase in phases)
    print(f"{'phase':{width}}  {'predicted':>10}  largest item")
    for phase in phases:
        print(f"{phase.name:{width}}  {format_bytes(phase.total + taken):>10}  {phase.largest} {format_bytes(phase.items[phase.largest])}")
    top = peak(phases)
    print(f"\nat the peak, {top.name}:")
    for name, size in sorted({**top.items, "held before the step (imports, data)": taken}.items(), key=lambda item: -item[1]):
        print(f"  {format_bytes(size):>10}  {name}")
    total = top.total + taken
    print(f"  {format_bytes(total):>10}  in all" + (f", of {config.memory.budget}" if config.memory.budget else ""))
    if tiers := describe(footprint, chosen, tokens, steps=step_count(config)):
        print("", *tiers, sep="\n")
    return 0
