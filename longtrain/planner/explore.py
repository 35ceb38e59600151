"""Every way to run a step on a machine: axes, optimizer placement, micro-batch; for each the fastest plan, sorted by tokens a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from longtrain.offload import DiskSettings
from longtrain.plan import Offload, Plan
from longtrain.planner.asked import Asked
from longtrain.planner.axes import Axes, all_axes, between, on_one_device
from longtrain.planner.cost import Phase, peak
from longtrain.planner.footprint import ModelFootprint
from longtrain.planner.machines import Machine
from longtrain.planner.search import fastest_plan
from longtrain.planner.seconds import StepTime, step_time
from longtrain.planner.smallest import smallest_plan, what_to_change
from longtrain.planner.tiers import TierUse, tier_use
from longtrain.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a step is to be planned for."""

    model: ModelFootprint
    """Whole, with AdamW's two moments in `optimizer`."""
    tokens: int
    batches: tuple[int, ...]
    """Micro-batches to try."""
    machine: Machine
    devices: int
    room: int
    """Bytes of each device for the step."""
    taken: int
    """Bytes of it that are gone before: imports, data."""
    host: int
    """Bytes of host memory, shared by the devices; 0: none."""
    disk: DiskSettings | None
    """Shared likewise."""
    staging: int
    steps: int
    masters: bool
    """Whether float32 weights stand beside the model's own."""
    places: tuple[str, ...]
    """Of the optimizer, to try: device, host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One way to run the step. Bytes are of one device."""

    axes: Axes
    optimizer: str
    batch: int
    plan: Plan
    """With the chunk of the whole sequence."""
    phases: Sequence[Phase]
    tiers: dict[str, TierUse]
    optimizer_on_host: int
    time: StepTime
    tokens: int
    """Of all sequences of the step."""
    ways: str

    @property
    def peak(self) -> Phase:
        return peak(self.phases)

    @property
    def rate(self) -> float:
        """Tokens a second, of all devices."""
        return self.tokens / self.time.total

    def utilisation(self, peak_flops: float) -> float:
        """Model FLOPs, as MFU counts them, of a device in the step, over what it could do."""
        return self.time.model_flops / self.time.total / peak_flops


def explore(wanted: Wanted, say: Callable[[str], object] = lambda text: None) -> list[Found]:
    """The fastest plan of every combination that fits, best first; empty where none does."""
    found = []
    for axes, optimizer, batch in combinations(wanted):
        say(f"{axes.sequence} devices a sequence, {axes.replicas} replicas, optimizer on the {optimizer}, micro-batch {batch}")
        if (one := fastest(wanted, axes, optimizer, batch, wanted.room)) is not None:
            found.append(one)
    return sorted(found, key=lambda one: -one.rate)


def combinations(wanted: Wanted) -> list[tuple[Axes, str, int]]:
    """Chunks must leave a token to every device."""
    axes = [a for a in all_axes(wanted.devices) if a.sequence == 1 or wanted.tokens >= 64 * a.sequence]
    return [(a, o, b) for a in axes for o in wanted.places for b in wanted.batches]


def fastest(wanted: Wanted, axes: Axes, optimizer: str, batch: int, room: int) -> Found | None:
    """None where nothing fits."""
    asked, on_host = of_one_device(wanted, axes, optimizer, batch)
    if asked is None or (chosen := fastest_plan(asked, room)) is None:
        return None
    return describe_found(wanted, axes, optimizer, batch, asked, chosen, on_host)


def by_hand(wanted: Wanted, plan: Plan, axes: Axes = Axes()) -> Found:
    """What a plan, with the chunk of the whole sequence, comes to on one device of `axes`. Raises ValueError where the host has no room for
    the optimizer."""
    asked, on_host = of_one_device(wanted, axes, wanted.places[0], 1)
    if asked is None:
        raise ValueError(f"memory.optimizer: host needs {format_bytes(on_host)}, of {format_bytes(wanted.host)}; give more")
    own = plan.with_chunks(max(1, min(plan.chunk_tokens, wanted.tokens) // axes.sequence))
    return describe_found(wanted, axes, wanted.places[0], 1, asked, own, on_host)


def lacks(wanted: Wanted, found: Found) -> str | None:
    """Why a plan that was made by hand does not fit; None where it does."""
    if found.peak.total > wanted.room:
        needed, there = found.peak.total + wanted.taken, wanted.room + wanted.taken
        return f"{format_bytes(needed)} are needed in the {found.peak.name}, of {format_bytes(there)}"
    return None if _within_tiers(wanted, found) else "memory.host_budget or memory.disk holds less than it sends there"


def smallest(wanted: Wanted, axes: Axes, optimizer: str, batch: int) -> Found | None:
    """The plan that needs least of the device; None where the host has no room for the optimizer."""
    asked, on_host = of_one_device(wanted, axes, optimizer, batch)
    if asked is None:
        return None
    return describe_found(wanted, axes, optimizer, batch, asked, smallest_plan(asked)[0], on_host)


def of_one_device(wanted: Wanted, axes: Axes, optimizer: str, batch: int) -> tuple[Asked | None, int]:
    """What one device is asked for, and the bytes of its share of the optimizer on the host."""
    model = on_one_device(wanted.model, axes, optimizer=optimizer, masters=wanted.masters)
    on_host = 0 if optimizer == "device" else (wanted.model.optimizer + 4 * wanted.model.trained) // axes.devices
    host = wanted.host // wanted.devices - on_host
    if host < 0:
        return None, on_host
    disk = wanted.disk
    if disk is not None:
        written = None if disk.max_written is None else disk.max_written // wanted.devices
        disk = replace(disk, budget=disk.budget // wanted.devices, max_written=written)
    tiers = Offload(host_bytes=host, disk=disk, staging_bytes=wanted.staging) if host or disk else None
    rates = wanted.machine.rates
    shared = replace(rates, disk_write=rates.disk_write / wanted.devices, disk_read=rates.disk_read / wanted.devices,
                     host_optimizer=rates.host_optimizer / wanted.devices)  # fmt: skip
    return Asked(model, -(-wanted.tokens // axes.sequence), batch, tiers, shared, wanted.steps, axes.sequence), on_host


def describe_found(wanted: Wanted, axes: Axes, optimizer: str, batch: int, asked: Asked, chosen: Plan, on_host: int) -> Found:
    time = step_time(asked.model, chosen, asked.tokens, batch, asked.rates, optimizer=optimizer, devices=axes.sequence)
    whole = chosen.with_chunks(min(chosen.chunk_tokens * axes.sequence, wanted.tokens))
    exchanged = between(wanted.model, whole, axes, wanted.tokens, batch, asked.rates, time.total - time.parts["optimizer"])
    parts = {**time.parts, "exchanges between devices": exchanged.seconds}
    return Found(
        axes=axes, optimizer=optimizer, batch=batch, plan=whole, phases=asked.memory(chosen),
        tiers=tier_use(asked.model, chosen, asked.tokens, batch), optimizer_on_host=on_host,
        time=replace(time, parts=parts, received=exchanged.received), tokens=wanted.tokens * batch * axes.replicas, ways=exchanged.ways,
    )  # fmt: skip


def longest_tokens(wanted: Wanted) -> int:
    """The longest sequence that some plan fits, to a 64th: by doubling, then bisection on the smallest plans."""

    def fits(tokens: int) -> bool:
        longer = replace(wanted, tokens=tokens)
        small = (smallest(longer, *combination) for combination in combinations(longer))
        return any(one is not None and one.peak.total <= wanted.room and _within_tiers(longer, one) for one in small)

    low, high = 0, wanted.tokens
    while high < 1 << 27 and fits(high):
        low, high = high, 2 * high
    while high - low > max(64, high // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _within_tiers(wanted: Wanted, found: Found) -> bool:
    asked, _ = of_one_device(wanted, found.axes, found.optimizer, found.batch)
    return asked.fits_tiers(found.plan.with_chunks(max(1, found.plan.chunk_tokens // found.axes.sequence)))


def pareto(wanted: Wanted, best: Found, points: int = 6) -> list[Found]:
    """The fastest plans of the best way's axes and optimizer at budgets from the least that is possible to all there is."""
    least = smallest(wanted, best.axes, best.optimizer, best.batch).peak.total
    rooms = [least + (wanted.room - least) * i // (points - 1) for i in range(points)]
    found = [fastest(wanted, best.axes, best.optimizer, best.batch, room) for room in rooms[:-1]] + [best]
    kept: list[Found] = []
    for one in sorted((f for f in found if f is not None), key=lambda f: (f.peak.total, f.time.total)):
        if not kept or one.time.total < kept[-1].time.total:
            kept.append(one)
    return kept


def refusal(wanted: Wanted) -> str:
    """What would make it possible, for the way that comes closest."""
    least = [(one.peak.total, c) for c in combinations(wanted) if (one := smallest(wanted, *c)) is not None]
    if not least:
        needed = (wanted.model.optimizer + 4 * wanted.model.trained) // wanted.devices
        return f"the optimizer needs {format_bytes(needed)} of host memory a device; give more"
    _, (axes, optimizer, batch) = min(least, key=lambda entry: entry[0])
    asked, _ = of_one_device(wanted, axes, optimizer, batch)
    text = what_to_change(asked, wanted.room + wanted.taken, wanted.taken)
    return f"closest: {axes.sequence} devices a sequence, {axes.replicas} replicas, optimizer on the {optimizer}: {text}"
