"""From the ledger to what is reported: the step with the peak, its phases, its timeline, the largest items.

The result, plain data in bytes and seconds, is what `profile.json` holds; table, page, picture and comparison are made from it alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from longtrain.memory.advice import remedy, sentence
from longtrain.memory.ledger import CATEGORIES, Item, Ledger
from longtrain.memory.sample import COLUMNS
from longtrain.memory.watch import BACKWARD, OPTIMIZER_END, STEP, Watch
from longtrain.offload.extent import State
from longtrain.planner.cost import Phase
from longtrain.planner.reuse import cached, place_in_two_levels

VERSION = 1
MOMENTS = 600
"""Of the timeline; each shows the most that was held in its stretch, so that no peak is lost."""
LARGEST = 20
PLACED, SMALL = 3000, 4096
"""Blocks whose places in an arena are planned: the largest, of so many bytes at least."""
NAMED = 3
"""Items that a moment of the timeline names."""


def account(
    watch: Watch,
    ledger: Ledger,
    *,
    predicted: Sequence[Phase] = (),
    budget: int | None = None,
    streamed: bool = False,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """The report's data. `facts` go into it as they are. A budget is for what is allocated on a GPU, and on a CPU for what is resident, as
    in `longtrain.planner.plan`."""
    gpu = watch.sampler.device.index if watch.sampler.device.type == "cuda" else -1
    device = gpu if (ledger.device == gpu).any() else -1
    level = ledger.level(device)
    first, last = step_with_peak(watch, level)
    peak = first + int(level[first : last + 1].argmax())
    held, counts = ledger.alive(device, peak), ledger.counts(device, peak)
    largest = top_items(ledger, held, counts, streamed)
    by_category = totals(ledger, held)
    measured, process = measured_phases(ledger, level, first, last), of_process(watch)
    result = {
        "version": VERSION,
        **facts,
        "device": "CPU" if device < 0 else f"GPU {device}",
        "categories": [c for c in CATEGORIES if c in by_category or ledger.running(device, numbers_of(ledger, c)).any()],
        "streamed": streamed,
        "budget": budget,
        "scratch_unseen": ledger.scratch_unseen,
        "over_budget": budget is not None and (int(level[peak]) if device >= 0 else process.get("used", 0)) > budget,
        "peak": {
            "bytes": int(level[peak]),
            "seconds": seconds(ledger, peak),
            "phase": name_of(ledger, context_at(ledger, peak)),
            "by_category": by_category,
            "items": largest,
            "unattributed": by_category.get("unattributed", 0),
        },
        "process": process,
        "phases": compare_phases(measured, predicted, ledger, device, streamed),
        "timeline": timeline(watch, ledger, device, level, first, last),
        "reuse": reuse(ledger, device, first, last),
    }
    result["sentence"] = sentence(result)
    return result


def step_with_peak(watch: Watch, level: np.ndarray) -> tuple[int, int]:
    """The first and last event of the step in which most was held; of all that was seen where that was in none."""
    marks = np.frombuffer(watch.marks, np.int64).reshape(-1, 4)
    cuts, trained = [], True
    for kind, _, _, event in marks.tolist():
        if kind == STEP and trained:
            cuts.append(event)
            trained = False
        trained = trained or kind == OPTIMIZER_END
    backward = marks[marks[:, 0] == BACKWARD, 3]
    end, peak = len(level) - 1, int(level.argmax())
    steps = [(a, b) for a, b in pairwise([*cuts, end]) if ((backward >= a) & (backward <= b)).any()]
    return next(((a, b) for a, b in steps if a <= peak <= b), (0, end))


def reuse(ledger: Ledger, device: int, first: int, last: int) -> dict[str, int]:
    """What an arena with planned offsets would take for the step's blocks, the largest `PLACED` of them: the liveness bound, the plan
    (`longtrain.planner.reuse`, grouped by the modules' visits), and an allocator that takes blocks as they come."""
    here = np.flatnonzero((ledger.device == device) & (ledger.start <= last) & (ledger.stop > first) & (ledger.nbytes >= SMALL))
    here = here[np.argsort(-ledger.nbytes[here], kind="stable")[:PLACED]]
    start, stop = np.maximum(ledger.start[here], first - 1), np.minimum(ledger.stop[here], last + 1)
    visits = [c.start for c in ledger.contexts if first <= c.start <= last]
    arena = place_in_two_levels(start, stop, ledger.nbytes[here], list(pairwise([*visits, last + 1])))
    return {"blocks": len(here), "bound": arena.bound, "planned": arena.size, "cached": cached(start, stop, ledger.nbytes[here])}


def seconds(ledger: Ledger, moment: int) -> float:
    """Of a number of events, since the profile began."""
    at = ledger.nanoseconds[moment - 1] if moment else ledger.began
    return round((int(at) - ledger.began) / 1e9, 6)


def context_at(ledger: Ledger, moment: int) -> int:
    return max(int(np.searchsorted([c.start for c in ledger.contexts], moment - 1, side="right")) - 1, 0)


def name_of(ledger: Ledger, context: int) -> str:
    """`backward of model.layers.3`."""
    found = ledger.contexts[context]
    of = ledger.modules[found.band]
    return f"{found.phase} of {of}" if of else found.phase


def numbers_of(ledger: Ledger, category: str) -> list[int]:
    return [i for i, item in enumerate(ledger.items) if item.category == category]


def totals(ledger: Ledger, held: np.ndarray) -> dict[str, int]:
    """Bytes by category, none of them 0."""
    sums = {c: int(sum(held[i] for i in numbers_of(ledger, c))) for c in CATEGORIES}
    return {c: n for c, n in sums.items() if n}


def top_items(ledger: Ledger, held: np.ndarray, counts: np.ndarray, streamed: bool) -> list[dict[str, Any]]:
    """What most was held in. Layers are one line (`model.layers.*.mlp`), and so are parameters and moments of a kind."""
    merged: dict[tuple, dict[str, Any]] = {}
    for i in np.argsort(-held, kind="stable").tolist():
        if not held[i]:
            break
        item = ledger.items[i]
        name, module = kind_of(item), re.sub(r"\.\d+(?=\.|$)", ".*", item.module)
        key = (item.category, name, module if name == item.name else "", item.line if name == item.name else "")
        line = merged.setdefault(key, {
            "category": item.category, "name": name, "module": key[2], "line": item.line, "shape": item.shape, "dtype": item.dtype,
            "bytes": 0, "count": 0, "remedy": remedy(item, streamed),
        })  # fmt: skip
        line["bytes"] += int(held[i])
        line["count"] += int(counts[i])
    return sorted(merged.values(), key=lambda line: -line["bytes"])[:LARGEST]


def kind_of(item: Item) -> str:
    """The same for what belongs together: the layers' numbers are left out of an extent's name, a parameter's module out of its."""
    if item.category in ("parameters", "gradients") and item.name:
        return f"of {item.name.rsplit('.', 2)[-2]}" if item.name.count(".") else item.name
    return re.sub(r"\blayer \d+", "layers", item.name)


def measured_phases(ledger: Ledger, level: np.ndarray, first: int, last: int) -> list[dict[str, Any]]:
    """The most that was held in each phase of a step, in order: forward, what is between the last layer and the backward pass, the backward
    pass by visible part, the optimizer."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    inside = [c for c in range(len(ledger.contexts)) if first <= ledger.contexts[c].start <= last]
    for at, c in enumerate(inside):
        context = ledger.contexts[c]
        stop = ledger.contexts[inside[at + 1]].start if at + 1 < len(inside) else last
        key = (context.phase, context.band)
        moment = context.start + int(level[context.start : stop + 1].argmax())
        row = found.setdefault(key, {"phase": context.phase, "band": ledger.modules[context.band], "moment": moment, "bytes": 0})
        if level[moment] > row["bytes"]:
            row["bytes"], row["moment"] = int(level[moment]), moment
    return list(found.values())


def compare_phases(
    measured: list[dict[str, Any]], predicted: Sequence[Phase], ledger: Ledger, device: int, streamed: bool
) -> list[dict[str, Any]]:
    """A row for each phase: predicted, measured, and the largest item in it. What a plan predicts beside the tensors (workspace of a CPU
    process) is not the allocator's and left out."""
    rows: dict[str, dict[str, Any]] = {}
    for part in measured:
        name = row_name(part, predicted)
        row = rows.setdefault(name, {"phase": name, "predicted": None, "measured": 0, "moment": 0})
        if part["bytes"] > row["measured"]:
            row["measured"], row["moment"] = part["bytes"], part["moment"]
    for phase in predicted:
        row = rows.setdefault(phase.name, {"phase": phase.name, "predicted": None, "measured": None, "moment": None})
        row["predicted"] = sum(size for what, size in phase.items.items() if what != "workspace")
    for row in rows.values():
        moment = row.pop("moment")
        if moment is not None:
            held = ledger.alive(device, moment)
            top = top_items(ledger, held, ledger.counts(device, moment), streamed)
            row["largest"], row["remedy"] = (describe(top[0]), top[0]["remedy"]) if top else ("", "")
            row["largest_bytes"] = top[0]["bytes"] if top else 0
    return list(rows.values())


def row_name(part: dict[str, Any], predicted: Sequence[Phase]) -> str:
    """The predicted phase that a measured one belongs to, or its own name."""
    number = re.search(r"\.(\d+)$", part["band"])
    if part["phase"] == "backward":
        for phase in predicted:
            layers = re.fullmatch(r"backward of layers (\d+) to (\d+)", phase.name)
            if layers and number and int(layers[1]) <= int(number[1]) <= int(layers[2]):
                return phase.name
        if re.search(r"(embed\w*|\bwte)$", part["band"]) and any(phase.name == "backward of the embedding" for phase in predicted):
            return "backward of the embedding"
        return f"backward of {part['band']}" if part["band"] else "backward"
    if part["phase"] == "forward" and not number and re.search(r"loss|head", part["band"]):
        return "loss"
    return part["phase"]


def describe(item: dict[str, Any]) -> str:
    return f"{item['category']}: {item['name']}" + (f" in {item['module']}" if item["module"] else "")


def timeline(watch: Watch, ledger: Ledger, device: int, level: np.ndarray, first: int, last: int) -> dict[str, Any]:
    """The step with the peak as lists of `MOMENTS` values, its bands and lanes; seconds since the step's begin."""
    begin = next((c.nanoseconds for c in ledger.contexts if c.start == first and c.nanoseconds), ledger.began)
    end = max(int(ledger.nanoseconds[last - 1]) if last else ledger.ended, int(begin) + 1)
    if last == len(level) - 1:
        end = max(end, ledger.ended)
    edges = np.linspace(int(begin), end, MOMENTS + 1)
    at = np.clip(np.searchsorted(ledger.nanoseconds, edges, side="right"), first, last)
    moments = [a + int(level[a : max(b, a) + 1].argmax()) for a, b in pairwise(at.tolist())]
    series = {c: ledger.running(device, numbers_of(ledger, c))[moments].tolist() for c in CATEGORIES}
    named: dict[int, int] = {}
    tops = []
    for moment in moments:
        held = ledger.alive(device, moment)
        tops.append([[named.setdefault(int(i), len(named)), int(held[i])] for i in np.argsort(-held)[:NAMED] if held[i]])
    items = [ledger.items[i] for i in named]

    def since(nanoseconds: float) -> float:
        return round((float(nanoseconds) - int(begin)) / 1e9, 6)

    rows = np.frombuffer(watch.sampler.rows, np.int64).reshape(-1, len(COLUMNS))
    rows = rows[(rows[:, 0] >= begin) & (rows[:, 0] <= end)]
    together = max(1, -(-len(rows) // MOMENTS))
    rows = np.array([[group[0, 0], *group[:, 1:].max(0)] for at in range(0, len(rows), together) if len(group := rows[at : at + together])])
    rows = rows.reshape(-1, len(COLUMNS))
    return {
        "seconds": [since(edge) for edge in edges[1:]],
        "level": level[moments].tolist(),
        "series": {c: values for c, values in series.items() if any(values)},
        "tops": tops,
        "items": [{"category": i.category, "name": i.name, "module": i.module, "line": i.line, "shape": i.shape} for i in items],
        "bands": bands(ledger, first, last, since),
        "samples": {
            "seconds": [since(row[0]) for row in rows],
            **{name: rows[:, column].tolist() for column, name in enumerate(COLUMNS) if column and (rows[:, column] > 0).any()},
        },
        "lanes": lanes(watch, int(begin), end, since),
    }


def bands(ledger: Ledger, first: int, last: int, since) -> list[dict[str, Any]]:
    """Stretches of the step in the same phase and visible part."""
    found: list[dict[str, Any]] = []
    for context in ledger.contexts:
        if not first <= context.start <= last or not context.nanoseconds:
            continue
        what = (context.phase, ledger.modules[context.band])
        begin = max(since(context.nanoseconds), 0.0)
        if found and (found[-1]["phase"], found[-1]["part"]) == what:
            continue
        if found:
            found[-1]["stop"] = begin
        found.append({"phase": what[0], "part": what[1], "start": begin, "stop": begin})
    if found:
        found[-1]["stop"] = since(ledger.nanoseconds[last - 1] if last < len(ledger.nanoseconds) else ledger.ended)
    return [band for band in found if band["stop"] > band["start"]]


def lanes(watch: Watch, begin: int, end: int, since) -> list[dict[str, Any]]:
    """Copies between the tiers, and collectives: rectangles on the timeline's clock. Those that touch are one."""
    found: dict[str, list[list[float]]] = {}
    started: dict[tuple[int, str], tuple[float, int]] = {}
    for event in watch.sampler.events:
        at = event.seconds * 1e9
        if event.after in (State.WRITING, State.READING):
            started[event.extent, "to" if event.after is State.WRITING else "from"] = at, event.nbytes
            continue
        for way, before in (("to", State.WRITING), ("from", State.READING)):
            if event.before is before and (begun := started.pop((event.extent, way), None)):
                found.setdefault(f"{way} {event.tier}", []).append([begun[0], at, begun[1], 1])
    sites = {number: site for site, number in watch.sites.items()}
    for start, stop, nbytes, site in np.frombuffer(watch.transfers, np.int64).reshape(-1, 4).tolist():
        found.setdefault(str(sites[site][0]).split(".")[-2].strip("_"), []).append([start, stop, nbytes, 1])
    drawn = []
    for name, spans in found.items():
        merged: list[list[float]] = []
        for span in sorted(s for s in spans if s[1] >= begin and s[0] <= end):
            if merged and span[0] - merged[-1][1] < (end - begin) / 1000:
                merged[-1] = [merged[-1][0], max(merged[-1][1], span[1]), merged[-1][2] + span[2], merged[-1][3] + 1]
            else:
                merged.append(span)
        if merged:
            drawn.append({"name": name, "spans": [[since(a), since(b), n, k] for a, b, n, k in merged]})
    return drawn


def of_process(watch: Watch) -> dict[str, int]:
    """The most that the samples saw of each, and what was used when the profile began."""
    rows = np.frombuffer(watch.sampler.rows, np.int64).reshape(-1, len(COLUMNS))
    most = {name: int(rows[:, i].max()) for i, name in enumerate(COLUMNS) if i and len(rows) and rows[:, i].max() > 0}
    return {**most, **({"used_at_start": int(rows[0, 1])} if len(rows) else {})}
