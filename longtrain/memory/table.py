"""The report on a terminal: phases, what was held at the peak, and how much of it nobody accounts for."""

from __future__ import annotations

from textwrap import shorten
from typing import Any

from longtrain.columns import columns
from longtrain.units import GIB


def gib(size: float | None) -> str:
    """`1.234`, in GiB."""
    return "" if size is None else f"{size / GIB:.3f}"


def table(result: dict[str, Any]) -> str:
    parts = [result["sentence"], ""]
    rows = [
        (
            row["phase"], gib(row["predicted"]), gib(row["measured"]), describe_error(row),
            shorten(row.get("largest", ""), 48), shorten(row.get("remedy", ""), 60),
        )
        for row in result["phases"]
    ]  # fmt: skip
    parts.append(columns(("phase", "predicted", "measured", "error %", "largest item", "what would reduce it"), rows, right=(1, 2, 3)))
    peak = result["peak"]
    rows = [
        (
            gib(i["bytes"]), str(i["count"]), i["category"], shorten(i["name"], 32), i["shape"], i["dtype"], shorten(i["module"], 32),
            shorten(i["line"], 48),
        )
        for i in peak["items"][:10]
    ]  # fmt: skip
    parts += ["", f"at the peak, {gib(peak['bytes'])} GiB in {peak['phase']} (amounts in GiB):"]
    parts.append(columns(("GiB", "blocks", "category", "what", "shape", "dtype", "module", "line"), rows, right=(0, 1)))
    parts += ["", closing(result)]
    if result["changes"]:
        parts += ["", "what would fit, the cheapest first:", *(f"  {text}" for text in result["changes"])]
    return "\n".join(parts)


def closing(result: dict[str, Any]) -> str:
    """How the ledger closes: allocated, what of it nobody claims, and what the process takes beside."""
    peak, process = result["peak"], result["process"]
    where = "resident" if result["device"] == "CPU" else "used on the device"
    share = peak["unattributed"] / max(peak["bytes"], 1)
    lines = [f"allocated {gib(peak['bytes'])} GiB, of it unattributed {gib(peak['unattributed'])} GiB ({share:.2%})"]
    if "reserved" in process:
        lines.append(f"reserved {gib(process['reserved'])} GiB")
    if "used" in process:
        lines.append(f"{where} {gib(process['used'])} GiB at most, {gib(process['used_at_start'])} GiB when the profile began")
    text = "; ".join(lines)
    if found := result.get("reuse"):
        text += (
            f"\nreuse of memory, {found['blocks']} largest blocks: an allocator that takes them as they come reserves "
            f"{gib(found['cached'])} GiB, planned offsets {gib(found['planned'])} GiB (fragmentation avoided: "
            f"{gib(max(0, found['cached'] - found['planned']))} GiB), no arena less than {gib(found['bound'])} GiB"
        )
    if result["scratch_unseen"]:
        text += f"\nScratch memory inside kernels was not seen: {result['missing']}."
    return text


def describe_error(row: dict[str, Any]) -> str:
    """Of the prediction, in percent of what was measured."""
    if not row["predicted"] or not row["measured"]:
        return ""
    return f"{100 * (row['predicted'] / row['measured'] - 1):+.1f}"
