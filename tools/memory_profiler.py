"""What any training script holds in memory: run it unchanged, and get the report of `lt.profile`.

    python tools/memory_profiler.py [--out DIR] [--sampling] [--budget 24GiB] SCRIPT [ARGUMENTS ...]

The report (DIR/profile.html, .json, .png; out/memory by default) shows the step in which most was held. A script that fails leaves it too.
Profile few steps: every block of memory that was taken is remembered.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/memory", metavar="DIR", help="directory to write (out/memory)")
    parser.add_argument("--sampling", action="store_true", help="under 5%% of the step's time, no operations and lines")
    parser.add_argument("--budget", metavar="SIZE", help="draw this line, such as 24GiB")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="of the script")
    a = parser.parse_args(argv)
    if not Path(a.script).is_file():
        parser.error(f"{a.script} is no file")
    from longtrain.memory import profile

    try:
        watched = profile(a.out, sampling=a.sampling, budget=a.budget, title=Path(a.script).stem)
    except ValueError as error:
        parser.error(str(error))
    own, sys.argv = sys.argv, [a.script, *a.arguments]
    sys.path[0] = str(Path(a.script).resolve().parent)
    status = 0
    try:
        with watched:
            try:
                runpy.run_path(a.script, run_name="__main__")
            except SystemExit as end:  # how many scripts end; only what it says decides
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
                status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.argv = own
    return status


if __name__ == "__main__":
    sys.exit(main())
