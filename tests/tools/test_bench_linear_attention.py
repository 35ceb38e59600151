"""benchmarks/linear_attention.py runs, and reports no time of an op whose gradients are wrong."""

import runpy
import sys
from pathlib import Path

import pytest

from longtrain.ops.linear_attention import decay

SCRIPT = str(Path(__file__).parents[2] / "benchmarks" / "linear_attention.py")
SMALL = ["--tokens", "64", "--heads", "1", "--dim", "8", "--repeats", "1", "--device", "cpu", "--backends", "chunked"]


def test_every_kind_has_its_row(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPT, *SMALL])
    runpy.run_path(SCRIPT, run_name="__main__")
    out = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in out[2:]] == ["plain", "head", "feature", "delta", "gated delta"]
    assert all(" ms" in line for line in out[1:])


def test_wrong_gradients_have_no_time(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPT, *SMALL])
    monkeypatch.setattr(decay, "sums_behind_vjp", lambda dsums: dsums)
    with pytest.raises(SystemExit):
        runpy.run_path(SCRIPT, run_name="__main__")
    assert "head, chunked, chunks of 64: WRONG" in capsys.readouterr().out
