"""Everything that needs a GPU, in one run: is it right, and how fast is it. Under eight minutes, without a network.

    python tools/gpu_check.py                  writes benchmarks/gpu_check.json and benchmarks/gpu_check.md
    python tools/gpu_check.py --dry-run-cpu    the same code on CPU tensors at tiny sizes, to test the check itself

Correctness comes first; where it fails, no speed is measured. Each section runs in a process of its own, and a section that gives
no row within its limit is ended and reported, and the others go on. Exit status: 0 all well, 1 something wrong, 3 no GPU.

Sections and their order are in gpu_check_rows.py, with those of correctness; attention's speed is in gpu_check_attention.py, layers of an
8B model in gpu_check_layers.py, convolution and linear attention in gpu_check_mixers.py, races in gpu_check_offload.py. How large
everything is, here and on a CPU, is in gpu_check_shapes.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from gpu_check_rows import SECTIONS, SPEED_SECTIONS
from gpu_check_shapes import Row, Sizes
from step_process import machine

TOTAL_SECONDS = 460
"""Of all sections on a GPU; a dry run takes as long as it takes."""
ROW_SECONDS = 100
LONGER = {"long layer": 180}
"""Sections whose one row may take more seconds: a layer at a million tokens is 65 s at its goal, and slower is a finding too."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run-cpu", action="store_true", help="run on the CPU at tiny sizes; figures mean nothing")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections only")
    parser.add_argument("--row-seconds", type=float, default=ROW_SECONDS, help="longest a row may take")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "benchmarks", help="folder of the results")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    sizes = Sizes.tiny_cpu() if a.dry_run_cpu else Sizes.gpu()
    if sizes.device == "cuda" and not torch.cuda.is_available():
        print(f"gpu_check: torch {torch.__version__} sees no GPU here; --dry-run-cpu exercises the same code on the CPU")
        return 3
    if a.section:
        for row in SECTIONS[a.section](sizes):
            print("ROW " + json.dumps(dataclasses.asdict(row)), flush=True)
        return 0
    started, total = time.monotonic(), math.inf if a.dry_run_cpu else TOTAL_SECONDS
    rows: list[Row] = []
    for section in a.only or SECTIONS:
        if section in SPEED_SECTIONS and any(row.passed is False for row in rows):
            rows.append(Row(section=section, name="-", passed=None, note="not measured: results above are wrong"))
            continue
        left = total - (time.monotonic() - started)
        if left < 5:
            rows.append(Row(section=section, name="-", passed=None, note=f"not run: the {total} s of the whole check are used up"))
            continue
        for row in run_section(section, a.dry_run_cpu, max(a.row_seconds, LONGER.get(section, 0)), left):
            rows.append(row)
            print(line(row), flush=True)
    title = "dry run on a CPU: figures mean nothing" if a.dry_run_cpu else torch.cuda.get_device_name()
    a.out.mkdir(parents=True, exist_ok=True)
    seconds = round(time.monotonic() - started, 1)
    (a.out / "gpu_check.json").write_text(
        json.dumps(
            {
                "title": title,
                "command": "python tools/gpu_check.py",
                "seconds": seconds,
                "machine": machine(),
                "rows": [dataclasses.asdict(r) for r in rows],
            },
            indent=1,
        )
        + "\n"
    )
    (a.out / "gpu_check.md").write_text(markdown(title, seconds, rows))
    wrong = [row for row in rows if row.passed is False]
    print(f"{len(rows)} rows in {seconds:.0f} s, {len(wrong)} not as they should be; written to {a.out / 'gpu_check.md'}")
    return 1 if wrong else 0


def run_section(section: str, dry_run: bool, row_seconds: float, left: float) -> list[Row]:
    """Rows of one section from a process of its own; it is ended where a row takes longer than `row_seconds`, which is wrong, or all take
    more than `left`, which is said."""
    command = [sys.executable, __file__, "--section", section, *(["--dry-run-cpu"] if dry_run else [])]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []

    def read() -> None:
        for text in process.stdout:
            lines.put(text)
        lines.put(None)

    readers = [threading.Thread(target=read), threading.Thread(target=lambda: errors.extend(process.stderr))]
    for reader in readers:
        reader.start()
    rows, end = [], time.monotonic() + left
    try:
        while (text := lines.get(timeout=max(0.01, min(row_seconds, end - time.monotonic())))) is not None:
            if text.startswith("ROW "):
                rows.append(Row(**json.loads(text[4:])))
    except queue.Empty:
        process.kill()
        late = time.monotonic() < end
        note = f"no row within {row_seconds:.0f} s: ended" if late else "not measured: the time of the whole check is used up"
        rows.append(Row(section=section, name="after row " + (rows[-1].name if rows else "0"), passed=False if late else None, note=note))
    status = process.wait()
    for reader in readers:
        reader.join()
    process.stdout.close()
    process.stderr.close()
    if status not in (0, -9):
        rows.append(Row(section=section, name="after row " + (rows[-1].name if rows else "0"), passed=False,
                        note="its process failed: " + (errors[-1].strip() if errors else f"status {status}")))
        sys.stderr.writelines(errors)
    return rows


def line(row: Row) -> str:
    mark = {True: "ok", False: "WRONG", None: "-"}[row.passed]
    expected = f"expected {row.expected}" if row.expected else ""
    return f"{mark:<6}{row.section:<11} {row.name:<47} {row.measured:<28} {expected:<44} {row.note}".rstrip()


def markdown(title: str, seconds: float, rows: list[Row]) -> str:
    head = [f"# GPU check: {title}", "", f"`python tools/gpu_check.py`, torch {torch.__version__}, {seconds:.0f} s.", "",
            "| | section | row | measured | expected | |", "|---|---|---|---|---|---|"]
    mark = {True: "ok", False: "**wrong**", None: ""}
    body = [f"| {mark[r.passed]} | {r.section} | {r.name} | {r.measured} | {r.expected} | {r.note} |" for r in rows]
    return "\n".join([*head, *body]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
