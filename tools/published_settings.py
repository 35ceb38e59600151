"""Published settings of long-sequence systems, predicted by the cost model: python tools/published_settings.py [--out FILE]

A row is a setting that is known: model, devices, tokens, and the method (checkpointing whole layers, hidden states offloaded or not, how
many devices share a sequence). The prediction is made of the same parts as `longtrain plan`: `Work` of a layer on shapes alone, the
machine's built-in rates, 4.5 A + 4 N for full checkpointing (3.5 A where attention outputs are kept), exchanges by
`longtrain.parallel.cost`; memory where a layer's MLP or its attention is differentiated, whichever holds more. Where a source gives MFU or
tokens/s, time follows. Bounds: 20%; what is outside, or not known, is said so. Of a length that is only known to have fitted the
prediction must fit too.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from longtrain.plan import Plan
from longtrain.planner.axes import Axes, between, on_one_device
from longtrain.planner.cost import GPU_WORKSPACE
from longtrain.planner.footprint import measure_model
from longtrain.planner.machines import MACHINES
from longtrain.planner.seconds import attention_flops, head_dim, token_seconds
from longtrain.planner.shapes import SHAPES, on_meta

BOUND = 0.2


@dataclass(frozen=True, slots=True)
class Setting:
    """One published number. `unit`: "tokens/s" a device, "s" a step, "MFU" (what the model needs, half of a causal square), "HFU" (with a
    forward pass that is run again counted, as Megatron's factor of 4 in place of 3 does), "GB" a device at the peak, "GB at most"."""

    system: str
    source: str
    shape: str
    machine: str
    devices: int
    tokens: int
    unit: str
    value: float
    forwards: float = 2.0
    """Of attention in a step: 2 with full checkpointing, 1 where outputs are kept."""
    away: float = 1.0
    """Share of the layer inputs that is on the host."""
    resident: bool = False
    """Whether float32 masters and moments are on the devices, sharded."""
    host: tuple[str, ...] = ()
    """What else is on the host: gradients, parameters."""
    tile: int | None = None
    """Tokens of the MLP at a time; all of a device's where nothing is told of tiles."""
    attention: tuple[float, float] | None = None
    """TFLOP/s of its kernel, forward and backward, where it is known and not what the machine's rates are of."""
    known: str = ""
    """What of the setting is not published, where that is much, or why the number cannot be what it is called."""


FA3 = (660, 575)
"""On an H100 at 8K, head dim 128 (arXiv:2407.08608)."""

FPDT = (
    "its published script (microsoft/Megatron-DeepSpeed, ds_pretrain_gpt_6.7B_fpdt_32k.sh) has FlashAttention-2 and full checkpointing. "
    "With these, 56% of what the model needs is 262 TFLOP/s done, 84% of the GPU, and that kernel does at most 73% (arXiv:2307.08691), so "
    "something else is counted. How is not told: with the forward pass that is run again (the row HFU) the prediction is 4% off; "
    "Megatron-DeepSpeed's own formula counts the whole square of attention too, which would make it twice that"
)
SETTINGS = (
    Setting("UPipe", "arXiv:2602.21196, FlashAttention-3 (togethercomputer/Untied-Ulysses)", "llama3-8b", "h100", 8, 131_072, "tokens/s",
            2281, attention=FA3),
    Setting("UPipe", "the same", "llama3-8b", "h100", 8, 1_048_576, "tokens/s", 473, attention=FA3),
    Setting("MEMO", "arXiv:2407.12117, section 5", "gpt-7b", "a800", 8, 1_048_576, "MFU", 0.523, forwards=1.0),
    Setting("FPDT", "arXiv:2408.16978: 2M on 4 GPUs, 4M on 8 at 56% MFU", "llama3-8b", "a100", 8, 4_194_304, "MFU", 0.56, known=FPDT),
    Setting("FPDT", "the same number, recomputation counted", "llama3-8b", "a100", 8, 4_194_304, "HFU", 0.56),
    Setting("FPDT", "its abstract: over 55%; likewise", "llama3-8b", "a100", 4, 2_097_152, "HFU", 0.55),
    Setting("TRL (ALST)", "TRL 1.13, guide to long contexts (huggingface.co/docs/trl)", "qwen3-8b", "h100", 8, 1_048_576, "s", 380,
            known="attention kernel not told"),
    Setting("TRL (ALST)", "the same", "qwen3-8b", "h100", 8, 1_048_576, "GB", 56.2, resident=True),
    Setting("ALST", "its recipe (snowflakedb/ArcticTraining, run-h200-sp1-llama-8b-liger-offload-tiled-mlp.yml)", "llama3-8b", "h200", 1,
            1_200_000, "GB", 136.15, host=("gradients", "parameters"), tile=4096),
    Setting("ALST", "arXiv:2506.13996; run-h100-sp1-llama-8b.yml", "llama3-8b", "h100", 1, 500_000, "GB at most", 80,
            host=("gradients", "parameters"), tile=4096),
    Setting("ALST", "arXiv:2506.13996; run-h100-sp8-llama-8b.yml", "llama3-8b", "h100", 8, 3_700_000, "GB at most", 80,
            host=("gradients",), tile=4096),
)  # fmt: skip


def predict(s: Setting) -> dict[str, float]:
    """Seconds a step, tokens a second and device, MFU, and GB a device."""
    model, machine = measure_model(on_meta(SHAPES[s.shape], torch.bfloat16)), MACHINES[s.machine]
    rates, layer, L, n = machine.rates, model.layers[0], len(model.layers), s.tokens / s.devices
    attention = attention_flops(layer, model, s.tokens) / s.devices
    dim = head_dim(layer, model)
    forward, backward = (
        [1e12 * r for r in s.attention] if s.attention else (rates.at(t, dim) for t in (rates.attention, rates.attention_backward))
    )
    compute = L * (
        s.forwards * attention / forward + 2.5 * attention / backward
        + n * (2 * token_seconds(layer.forward, rates) + token_seconds(layer.backward, rates))
    )  # fmt: skip
    head = 6 * model.width * model.vocab_size * n
    compute += head / rates.at(rates.products, model.width)
    axes = Axes(sequence=s.devices)
    exchanged = between(model, Plan(chunk_tokens=s.tokens), axes, s.tokens, 1, rates, compute)
    seconds = compute + exchanged.seconds + model.trained / s.devices * 40 / rates.optimizer
    flops = 3 * L * (layer.forward.flops * n + attention) + head
    again = L * (layer.forward.flops * n + (s.forwards - 1) * attention)
    own = on_one_device(model, axes, optimizer="device" if s.resident else "host", masters=True)
    f = own.layers[0]
    weights = (
        own.parameters * ("parameters" not in s.host) + 2 * f.parameters + own.optimizer
        + (L * f.delivered_gradients + own.other_gradients // s.devices) * ("gradients" not in s.host)
    )  # fmt: skip
    at_mlp = (3 * f.x + f.carry + 2 * f.output) * n + min(n, s.tile or n) * f.graph
    of_queries = 3 * (f.output - f.lse)  # their gradient, and its float32 sums (FlashAttention-2, algorithm 2)
    at_attention = (f.x + f.mixing[0] + f.carry + f.adjoint + f.output + of_queries) * n
    peak = weights + (1 - s.away) * L * f.x * n + max(at_mlp, at_attention) + GPU_WORKSPACE
    return {
        "s": seconds,
        "tokens/s": n / seconds,
        "MFU": flops / seconds / machine.peak_flops,
        "HFU": (flops + again) / seconds / machine.peak_flops,
        "GB": peak / 1e9,
        "GB at most": peak / 1e9,
    }


def shown(value: float, unit: str) -> str:
    return f"{value:.1%} {unit}" if unit in ("MFU", "HFU") else f"{value:,.0f} {unit}"


def judged(s: Setting, found: float) -> tuple[str, bool]:
    """The error as the table has it, and whether it is within the bounds."""
    if s.unit == "GB at most":
        return ("fits" if found <= s.value else "does not fit"), found <= s.value
    error = found / s.value - 1
    return f"{error:+.0%}", abs(error) <= BOUND


def table() -> str:
    notes, lines = [], ["| system | setting | published | predicted | error | source |", "|" + "---|" * 6]
    for s in SETTINGS:
        found = predict(s)[s.unit]
        error, good = judged(s, found)
        verdict = "" if good else " (outside 20%; see below)" if s.known else " (outside 20%)"
        notes += [f"{s.system}: {s.known}."] if s.known and not good else []
        lines.append(
            f"| {s.system} | {s.shape}, {s.tokens:,} tokens, {s.devices} x {s.machine} | {shown(s.value, s.unit)} | "
            f"{shown(found, s.unit.removesuffix(' at most'))} | {error}{verdict} | {s.source} |"
        )
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a Markdown file to write too")
    a = parser.parse_args(argv)
    text = table()
    print(text)
    if a.out:
        a.out.write_text(f"`python tools/published_settings.py`\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
