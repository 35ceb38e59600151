"""`longtrain train` on several processes of this machine, forked from one that has imported everything, and what it did compared."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longtrain.train.output import read_metrics

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["longtrain.cli", "longtrain.train.loop", "torch._dynamo"])
LONGEST = 600.0
"""Seconds that a test waits for processes."""


class Ranks:
    """The processes of one job, started; each writes into a log of its own."""

    def __init__(
        self, size: int, directory: Path, config: Path, *overrides: str, own: dict[int, tuple[str, ...]] | None = None, before: str = "",
        flags: tuple[str, ...] = (), command: str = "train",
    ) -> None:
        """`own`: overrides of single ranks. `before`: ``module:function``, called with the rank in each process first."""
        number = len(list(directory.glob("job*")))
        self.directory = directory / f"job{number}"
        self.directory.mkdir()
        meet = f"file://{self.directory / 'meet'}"
        self.processes = []
        for rank in range(size):
            settings = dict(o.split("=", 1) for o in (*overrides, *(own or {}).get(rank, ())))
            arguments = [command, *flags, str(config), *(f"{key}={value}" for key, value in settings.items())]
            self.processes.append(FORKS.Process(target=_rank, args=(rank, size, meet, arguments, str(self._log(rank)), before)))
            self.processes[-1].start()

    def _log(self, rank: int) -> Path:
        return self.directory / f"rank{rank}.log"

    def said(self, rank: int = 0) -> str:
        return self._log(rank).read_text()

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def wait(self, ranks=None, seconds: float = LONGEST) -> list[int]:
        """Exit codes, by rank. Those that still run after `seconds` are killed: -9."""
        chosen = range(len(self.processes)) if ranks is None else ranks
        deadline = time.monotonic() + seconds
        for rank in chosen:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        codes = [self.processes[rank].exitcode for rank in chosen]
        self.kill()
        return [-signal.SIGKILL if code is None else code for code in codes]

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def wait_for(self, text: str, rank: int = 0) -> None:
        """Until a rank has said something that the regular expression `text` finds."""
        deadline = time.monotonic() + LONGEST
        while not re.search(text, self.said(rank) if self._log(rank).exists() else ""):
            if not self.processes[rank].is_alive() or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"rank {rank} never said {text!r}: {self.said(rank)[-2000:]}")
            time.sleep(0.01)


def _rank(rank: int, size: int, meet: str, arguments: list[str], log: str, before: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LONGTRAIN_MEET": meet}
    import torch

    from longtrain import cli

    torch.set_num_threads(1)
    if before:
        module, _, function = before.partition(":")
        getattr(importlib.import_module(module), function)(rank)
    code = 1
    try:
        code = cli.main(arguments)
    finally:
        os._exit(code)


def losses(out: Path) -> dict[str, list[float]]:
    records = read_metrics(out / "metrics.jsonl")
    steps, validations = ([r for r in records if r["kind"] == kind] for kind in ("step", "validation"))
    return {
        "steps": [r["step"] for r in steps],
        "loss": [r["loss"] for r in steps],
        "grad_norm": [r["grad_norm"] for r in steps],
        "targets": [r["targets"] for r in steps],
        "validation": [r["loss"] for r in validations],
        "positions": [p["loss"] for r in validations for p in r["positions"]],
    }


def assert_same_run(out: Path, alone: Path) -> None:
    for name, expected in losses(alone).items():
        assert losses(out)[name] == pytest.approx(expected, rel=1e-6), name
    ours, theirs = (load_file(next(d.rglob("*model.safetensors"))) for d in (out, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
