"""Races between transfers and kernels: rows of gpu_check.py, and a program of its own for the sanitizer.

    TORCH_CUDA_SANITIZER=1 python tools/gpu_check_offload.py --device cuda
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from longtrain.offload import DiskSettings, Place, TieredStore
from longtrain.offload.system import System
from longtrain.span import Span

RUNS = {"cuda": 100, "cpu": 10}
TOKENS, WIDTH = 64, 1024
CYCLES = 1_000_000  # of a GPU: about half a millisecond


class Late(System):
    """Copies are late, and one wait may be missing."""

    def __init__(self, device: str, leave_out: str | None) -> None:
        super().__init__(4)
        self.device, self.leave_out = device, leave_out

    def honours(self, wait: str) -> bool:
        return wait != self.leave_out

    def delay(self) -> None:
        if self.device == "cuda":
            torch.cuda._sleep(CYCLES)
        else:
            time.sleep(20e-3)

    def pread(self, file, data: memoryview, offset: int) -> int:
        if self.device == "cpu":  # reads go straight into its tensors, without a copy
            self.delay()
        return super().pread(file, data, offset)

    def filesystem(self, path: str) -> str:
        return ""  # temporary files in memory will do here


def wrong_runs(device: str, leave_out: str | None, runs: int) -> int:
    """How many of `runs` came back with other values than were put, or with an error that says so."""
    wrong, size = 0, 4 * TOKENS * WIDTH
    with tempfile.TemporaryDirectory() as path:
        disk = DiskSettings(path=path, budget=8 * size)
        store = TieredStore(device, host_bytes=8 * size, disk=disk, staging_bytes=8 * size, system=Late(device, leave_out))
        span = Span(0, TOKENS)
        for run in range(runs):
            x = torch.full((1, TOKENS, WIDTH), -1.0, device=device)
            if device == "cuda":
                torch.cuda._sleep(20 * CYCLES)  # the values are not there when put is called, nor when its copy would start
            x.fill_(run)
            try:
                store.put(run, span, x, Place(tier=("host", "disk")[run % 2]))
                store.settle()
                del x
                store.prefetch([(run, span)])
                found = store.get(run, span)
                wrong += not bool((found == run).all())
            except RuntimeError as error:
                if "cannot be read back" not in str(error):
                    raise
                wrong += 1
            store.release(run)
        if device == "cuda":
            torch.cuda.synchronize()  # copies that nobody waited for
        store.close()
    return wrong


def race_rows(device: str) -> Iterator[tuple[str, str, str, bool]]:
    """Name, measured, expected, passed."""
    runs = RUNS[device]
    wrong = wrong_runs(device, None, runs)
    yield "transfers that are late", f"{wrong} of {runs} wrong", "0", wrong == 0
    for wait in ("computed", "copied") if device == "cuda" else ("fetched",):
        wrong = wrong_runs(device, wait, runs)
        least = runs if device == "cuda" else 1  # a GPU's own clock makes it late; a CPU's sleep may be overslept by the other thread
        yield f"planted: no wait {wait!r}", f"{wrong} of {runs} caught", f"at least {least}", wrong >= least
    if device == "cpu":
        return
    command = [sys.executable, __file__, "--device", device]
    done = subprocess.run(command, env={**os.environ, "TORCH_CUDA_SANITIZER": "1"}, capture_output=True, text=True)
    clean = done.returncode == 0 and "possible data race" not in done.stdout + done.stderr
    last = (done.stderr.strip().splitlines() or [""])[-1]
    yield "TORCH_CUDA_SANITIZER=1", "clean" if clean else f"status {done.returncode}: {last[:60]}", "clean", clean


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    sys.exit(int(wrong_runs(parser.parse_args().device, None, runs=10) > 0))
