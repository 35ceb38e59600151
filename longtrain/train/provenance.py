"""Where a result came from: versions, git commit, and what `longtrain doctor` says of the machine."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import numpy
import torch

import longtrain as lt
from longtrain import doctor


def provenance() -> dict:
    """Plain values for the record of a run's start."""
    return {
        "longtrain": lt.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "command": sys.argv,
        "commit": git_commit(Path(lt.__file__).parent),
        "doctor": [*doctor.machine(), *doctor.software(), *doctor.backend_table()],
    }


def git_commit(directory: Path) -> str | None:
    """The commit that `directory` is checked out at, with `-dirty` where tracked files were changed; None outside of git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
