"""The benchmark of the data path runs."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "bench_data.py"


@pytest.mark.slow
def test_every_row_is_printed():
    command = [sys.executable, TOOL, "--mib", "4", "--documents", "1000", "--updates", "3"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0].rstrip(",") for line in printed] == ["build", "build", "load", "load", "load", "pack", "pack", "pack", "pack"]
