"""`tools/kill_ranks.py`, with one kill."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "kill_ranks.py"


@pytest.mark.slow
def test_a_kill_and_a_comparison():
    done = subprocess.run([sys.executable, str(TOOL), "--kills", "1", "--steps", "12"], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0 and "as one process that was left alone" in done.stdout, done.stdout + done.stderr
