"""What `longtrain plan` prints and writes: plans as a table, memory by phase and tier, time by part, the formulas with their numbers,
YAML."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import yaml

from longtrain.columns import columns
from longtrain.plan import SPLITS, STAY, Split
from longtrain.planner.explore import Found, Wanted
from longtrain.planner.tiers import describe
from longtrain.units import format_bytes


def table(found: Sequence[Found], wanted: Wanted) -> list[str]:
    """One line a way to run the step, the fastest first."""
    several = wanted.devices > 1
    header = ["s a step", "tokens/s", "MFU", "peak", "chunk", "segment", "outputs", "K/V", "micro-batch", "optimizer", "written to disk"]
    rows = [
        (
            f"{f.time.total:,.1f}", f"{f.rate:,.0f}", f"{f.utilisation(wanted.machine.peak_flops):.1%}",
            format_bytes(f.peak.total + wanted.taken), str(f.plan.chunk_tokens), str(f.plan.segment_layers), mean(f.plan.store_outputs),
            mean(f.plan.store_kv), str(f.batch), f.optimizer,
            format_bytes(f.tiers["disk"].written * wanted.devices), *([str(f.axes), f.ways] if several else []),
        )
        for f in found
    ]  # fmt: skip
    return [columns([*header, *(["devices a sequence x replicas", "way"] if several else [])], rows, right=range(6))]


def mean(fraction: float | tuple[float, ...]) -> str:
    """Of a setting that may differ by layer."""
    return f"{sum(fraction) / len(fraction):.2f} (by layer)" if isinstance(fraction, tuple) else f"{fraction:.2f}"


def memory(found: Found, wanted: Wanted) -> list[str]:
    """By phase, at the peak, by tier; and what binds."""
    plan, phases = found.plan, found.phases
    lines = [f"the plan: chunks of {plan.chunk_tokens} tokens; segments of {plan.segment_layers} layers; {mean(plan.store_outputs)} of the "
             f"outputs and {mean(plan.store_kv)} of K/V stored; optimizer on the {found.optimizer}", ""]  # fmt: skip
    lines.append(columns(("phase", "predicted", "largest item"), [
        (p.name, format_bytes(p.total + wanted.taken), f"{p.largest} {format_bytes(p.items[p.largest])}") for p in phases
    ], right=(1,)))  # fmt: skip
    top = found.peak
    lines += ["", f"at the peak, {top.name}:"]
    items = {**top.items, "held before the step (imports, data)": wanted.taken}
    lines += [f"  {format_bytes(size):>10}  {name}" for name, size in sorted(items.items(), key=lambda item: -item[1]) if size]
    lines.append(f"  {format_bytes(top.total + wanted.taken):>10}  in all, of {format_bytes(wanted.room + wanted.taken)}")
    if found.optimizer_on_host:
        lines.append(f"  {format_bytes(found.optimizer_on_host)} of the optimizer on the host")
    local = plan.with_chunks(max(1, plan.chunk_tokens // found.axes.sequence))
    if tiers := describe(wanted.model, local, -(-wanted.tokens // found.axes.sequence), found.batch, steps=wanted.steps):
        lines += ["", *tiers]
    return [*lines, "", binding(found, wanted)]


def binding(found: Found, wanted: Wanted) -> str:
    """What a faster plan would need more of."""
    top, parts = found.peak, found.time.parts
    if parts["exposed transfers"] > 0.02 * found.time.total:
        return f"binding: transfers, {parts['exposed transfers']:,.1f} s of which no compute hides; a faster disk or more host memory"
    if parts["exchanges between devices"] > 0.1 * found.time.total:
        return f"binding: exchanges between devices, {parts['exchanges between devices']:,.1f} s; faster links, or fewer devices a sequence"
    if top.total > 0.97 * wanted.room:
        return f"binding: the memory of the device, in {top.name}; above all {top.largest}"
    return "binding: arithmetic; more memory would not make it faster by much"


def time(found: Found, wanted: Wanted) -> list[str]:
    spent, total = found.time, found.time.total
    lines = [f"time: {total:,.1f} s a step ({total / 3600:.3f} h), {found.rate:,.0f} tokens/s, "
             f"MFU {found.utilisation(wanted.machine.peak_flops):.1%} of {wanted.machine.peak_flops / 1e12:,.4g} TFLOP/s"]  # fmt: skip
    lines += [f"  {seconds:12,.2f} s  {seconds / total:6.1%}  {name}" for name, seconds in spent.parts.items() if seconds]
    lines.append(f"  {spent.model_flops:.3e} FLOP that the model needs, {spent.done_flops:.3e} done, on each device")
    for tier, (written, read) in spent.moved.items():
        lines.append(f"  {tier}: {written / 1e9:,.1f} GB written, {read / 1e9:,.1f} GB read, by each device")
    if spent.received:
        lines.append(f"  {spent.received / 1e9:,.1f} GB received from other devices, by each")
    return lines


def formulas(found: Found, wanted: Wanted) -> list[str]:
    """The largest terms again, each as a product that can be done by hand; n tokens of one device, L layers, k a segment."""
    model, plan = wanted.model, found.plan
    n, L, k = -(-wanted.tokens // found.axes.sequence) * found.batch, len(model.layers), plan.segment_layers
    chunk = -(-plan.chunk_tokens // found.axes.sequence) * found.batch
    f, shards = model.layers[0], found.axes.devices
    flops = f.forward.flops
    rates, spent = wanted.machine.rates, found.time.parts
    lines = [
        "by hand (a layer's bytes a token: " + f"input {f.x}, output and LSE {f.output}, K/V {f.carry}, their sums {f.adjoint}; GB = 1e9):",
        f"  parameters             {model.parameters / 1e9:.2f} GB / {shards} = {model.parameters / shards / 1e9:.2f} GB",
        f"  gradients              4 x {model.trained / 1e9:.3f} G / {shards} = {4 * model.trained / shards / 1e9:.2f} GB "
        "at the end of the backward pass",
        f"  optimizer              {'8 + 4' if wanted.masters else '8'} bytes x {model.trained / 1e9:.3f} G / {shards} = "
        f"{(model.optimizer + 4 * model.trained * wanted.masters) / shards / 1e9:.2f} GB on the {found.optimizer}",
        f"  layer inputs           L / k x {f.x} n = {-(-L // k)} x {f.x} x {n:,} = {-(-L // k) * f.x * n / 1e9:,.2f} GB in all tiers",
        f"  outputs, LSE           L x {f.output} n = {L} x {f.output} x {n:,} = {L * f.output * n / 1e9:,.2f} GB in all tiers "
        "if all are stored",
        f"  gradient of the hidden states   {f.x} n = {f.x * n / 1e9:.2f} GB in all tiers",
        f"  K/V and sums           k x ({f.carry} + {f.adjoint}) n = {k} x {f.carry + f.adjoint} x {n:,} = "
        f"{k * (f.carry + f.adjoint) * n / 1e9:.2f} GB",
        f"  graph of a chunk       {f.graph} a token and layer at the highest, {f.saved[0]:.0f} for each layer before it: "
        f"{(f.graph + (k - 1) * f.saved[0]) * chunk / 1e9:.2f} GB of {chunk:,} tokens, and {k} x {f.chunk_gradients / 1e9:.2f} GB of a "
        "chunk's parameter gradients",
    ]  # fmt: skip
    if f.lse:
        dim = round((f.output - f.lse) / model.dtype.itemsize)
        pairs = wanted.tokens * wanted.tokens / 2 * found.batch / found.axes.sequence
        attention = 4 * dim * pairs
        at = rates.at(rates.attention, dim / (f.lse / 4)), rates.at(rates.attention_backward, dim / (f.lse / 4))
        size = max((size for (size, _), _ in f.forward.products), default=0)
        at_products = rates.at(rates.products, size)
        lines += [
            f"  attention, one layer   A = 4 x {dim} x T^2 / 2 = {attention:.3e} FLOP (full causal; windows less), "
            f"L A / {at[0] / 1e12:.4g} T/s + 2.5 L A / {at[1] / 1e12:.4g} T/s = {L * attention * (1 / at[0] + 2.5 / at[1]):,.1f} s; "
            f"printed above {spent['attention']:,.1f} s",
            f"  products, one layer    N = {flops:.4e} FLOP a token x n = {flops * n:.3e}, 4 L N / {at_products / 1e12:.4g} T/s = "
            f"{4 * L * flops * n / at_products:,.1f} s; with what moves memory and launches {spent['token-local']:,.1f} s",
        ]  # fmt: skip
    return lines


def front(found: Sequence[Found], wanted: Wanted) -> list[str]:
    """Plans of which none is both smaller and faster."""
    rows = [
        (format_bytes(f.peak.total + wanted.taken), f"{f.time.total:,.1f}", str(f.plan.chunk_tokens), str(f.plan.segment_layers),
         mean(f.plan.store_outputs))
        for f in found
    ]  # fmt: skip
    return ["less memory or less time (Pareto front):", columns(("peak", "s a step", "chunk", "segment", "outputs"), rows, right=range(4))]


def as_yaml(found: Found, wanted: Wanted, title: str) -> str:
    """Settings that `longtrain train` takes: the sections memory and, for several devices, parallel."""
    plan, settings = found.plan, {"chunk_tokens": found.plan.chunk_tokens, "segment_layers": found.plan.segment_layers}
    settings |= {name: plain(getattr(plan, name)) for name in ("store_outputs", "store_kv", "boundaries")}
    settings |= {name: value for name in ("kv_block_tokens", "loss_chunk_tokens") if (value := getattr(plan, name)) is not None}
    if plan.offload is not None:
        offload = plan.offload
        if wanted.host:
            settings["host_budget"] = f"{offload.host_bytes}B"
        if offload.disk is not None:
            disk = {"path": offload.disk.path, "budget": f"{offload.disk.budget}B"}
            settings["disk"] = disk | ({"max_written": f"{offload.disk.max_written}B"} if offload.disk.max_written else {})
        settings["staging"] = f"{offload.staging_bytes}B"
        settings["offload"] = {name: plain(getattr(offload, name)) for name in SPLITS}
    if found.optimizer == "host":
        settings["optimizer"] = "host"
    about = [
        f"# {title}, {wanted.tokens:,} tokens on {wanted.devices} x {wanted.machine.name}: predicted "
        f"{format_bytes(found.peak.total + wanted.taken)} a device, {found.time.total:,.1f} s a step ({found.rate:,.0f} tokens/s).",
    ]  # fmt: skip
    sections = {"memory": settings}
    if wanted.devices > 1:
        heads = gcd(found.axes.sequence, max((f.lse // 4 for f in wanted.model.layers), default=0) or 1)
        sections["parallel"] = {"dp_shard": found.axes.replicas, "cp_ring": found.axes.sequence // heads, "cp_ulysses": heads}
    return "\n".join([*about, yaml.safe_dump(sections, sort_keys=False, default_flow_style=None, width=140)])


def plain(value: object) -> object:
    """As YAML has it."""
    if isinstance(value, tuple):
        return [plain(one) for one in value]
    if not isinstance(value, Split):
        return value
    if value == STAY:
        return "device"
    return {"device": round(value.device, 4), "host": round(value.host, 4), **({"compress": True} if value.compress else {})}

