"""Runs a file of checks in Triton's interpreter, as a process of its own: Triton reads TRITON_INTERPRET when a kernel is defined."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def interpreted(name: str, *arguments: object) -> None:
    """`tests/kernels/NAME.py` with drawn cases by number and its functions by name."""
    if number_of(version("triton")) < (3, 7) and number_of(version("numpy")) >= (2, 4):
        pytest.skip("Triton 3.6's interpreter reads numbers out of arrays of one element, which NumPy 2.4 refuses; numpy<2.4 serves")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tests.kernels.{name}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def number_of(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def run(check_drawn: Callable[[int], None], functions: dict[str, Callable[[], None]]) -> None:
    """What that process does with its arguments."""
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's: the interpreter computes lanes that are masked afterwards
    torch.manual_seed(0)
    for argument in sys.argv[1:]:
        check_drawn(int(argument)) if argument.isdigit() else functions[argument]()
