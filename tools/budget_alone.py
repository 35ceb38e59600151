"""A budget alone: ten (model, budget, length) triples, each trained by `longtrain train` from a config that says nothing of memory but the
budget.

    python tools/budget_alone.py [--only 2 5] [--out DIR]

A triple trains two updates, and its peak resident memory is held against the budget; or it is refused, and one of the changes that the
refusal names (a larger budget, a shorter sequence) is made, which then must train within its budget. Every run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Triple:
    model: str
    budget: str
    tokens: int


MODELS = {
    "small": {"vocab_size": 256, "num_layers": 4, "hidden_size": 128, "intermediate_size": 384, "num_heads": 4, "num_kv_heads": 2},
    "deep": {"vocab_size": 256, "num_layers": 12, "hidden_size": 64, "intermediate_size": 192, "num_heads": 2, "num_kv_heads": 1},
    "wide": {"vocab_size": 4096, "num_layers": 2, "hidden_size": 256, "intermediate_size": 1024, "num_heads": 4, "num_kv_heads": 2},
    "windows": {"vocab_size": 256, "num_layers": 4, "hidden_size": 128, "intermediate_size": 384, "num_heads": 4, "num_kv_heads": 2,
                "window": [256, 256, 256, None]},
    "states": {"vocab_size": 256, "num_layers": 4, "hidden_size": 128, "intermediate_size": 384, "num_heads": 4, "num_kv_heads": 4,
               "layers": ["linear", "attention"]},
}  # fmt: skip
TRIPLES = (
    Triple("small", "1GiB", 8192), Triple("small", "640MiB", 8192), Triple("small", "400MiB", 8192), Triple("deep", "700MiB", 8192),
    Triple("deep", "460MiB", 16384), Triple("wide", "1GiB", 8192), Triple("wide", "480MiB", 8192), Triple("windows", "700MiB", 32768),
    Triple("windows", "500MiB", 65536), Triple("states", "700MiB", 16384),
)  # fmt: skip


def config(triple: Triple, directory: Path) -> str:
    settings = {
        "model": MODELS[triple.model], "memory": {"budget": triple.budget}, "data": {"source": "stdlib", "seq_len": triple.tokens},
        "train": {"steps": 2, "lr": 1e-3, "validate_every": 2, "validation_tokens": triple.tokens, "kernel_fallback": "warn"},
        "output": {"dir": str(directory / "run"), "overwrite": True},
    }  # fmt: skip
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False).replace("lr: 0.001", "lr: 1e-3"))
    return str(path)


def train(triple: Triple) -> tuple[int | None, str]:
    """Peak resident bytes, None where it was refused; and what it printed."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "longtrain.cli", "train", config(triple, Path(directory))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 2:
            return None, done.stderr.strip()
        if done.returncode:
            raise RuntimeError(f"{triple}: {done.stderr[-2000:]}")
        records = [json.loads(line) for line in (Path(directory) / "run" / "metrics.jsonl").read_text().splitlines()]
        return max(r.get("peak_bytes") or 0 for r in records), done.stdout


def changed(triple: Triple, refusal: str) -> Triple:
    """With the change that the refusal names: a shorter sequence where there is one, else the budget that suffices."""
    if found := re.search(r"the sequence length to (\d+)", refusal):
        return Triple(triple.model, triple.budget, int(found[1]))
    if found := re.search(r"set the budget to (\d+MiB)", refusal):
        return Triple(triple.model, found[1], triple.tokens)
    raise RuntimeError(f"{triple} was refused without a change that would do: {refusal}")


def row(triple: Triple) -> tuple[str, bool]:
    """Of the table; and whether it went as it should."""
    peak, said = train(triple)
    what = f"| {triple.model} | {triple.budget} | {triple.tokens:,} | "
    if peak is None:
        other = changed(triple, said)
        peak, said = train(other)
        if peak is None:
            return what + f"refused, and {other} too: {said} | | |", False
        what += f"refused; then {other.budget}, {other.tokens:,} tokens | "
        triple = other
    else:
        what += "trained | "
    from longtrain.units import parse_bytes

    within = peak <= parse_bytes(triple.budget)
    return what + f"{peak / MIB:,.0f} MiB | {peak / parse_bytes(triple.budget):.1%}{'' if within else ' !'} |", within


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", help="these of the ten, from 0")
    parser.add_argument("--out", type=Path, help="a Markdown file to write")
    a = parser.parse_args(argv)
    lines, well = ["| model | budget | tokens | what happened | peak resident | of the budget |", "|" + "---|" * 6], True
    for number, triple in enumerate(TRIPLES):
        if a.only is None or number in a.only:
            line, good = row(triple)
            print(line, flush=True)
            lines.append(line)
            well = well and good
    if a.out:
        a.out.write_text("`python tools/budget_alone.py`\n\n" + "\n".join(lines) + "\n")
    return 0 if well else 1


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    sys.exit(main())
