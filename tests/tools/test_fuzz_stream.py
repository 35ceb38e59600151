"""A few drawn cases, and that a wrong gradient would be told, with the command that repeats it."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason='needs pip install "longtrain[hf]"')
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import fuzz_stream as tool

from longtrain.stream.carry import KVCarry


def test_a_few_cases_are_exact_or_refused(capsys):
    assert tool.main(["--count", "6", "--families", "own", "own", "llama"]) == 0
    assert "exact" in capsys.readouterr().out


def test_a_case_is_the_same_whenever_it_is_drawn():
    one, other = (tool.Case(3, ["own", "llama"]) for _ in range(2))
    assert one.plan == other.plan and (one.family, one.how, one.twist) == (other.family, other.how, other.twist)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one.calls, other.calls, strict=True))


def test_what_is_wrong_is_told_with_the_command_that_repeats_it(monkeypatch, capsys):
    take_grad = KVCarry.take_grad

    def off(self, span, **settings):  # by less than a proof sees
        dk, dv = take_grad(self, span, **settings)
        return dk, dv * (1 + 1e-8)

    monkeypatch.setattr(KVCarry, "take_grad", off)
    assert tool.main(["--seed", "7", "--count", "1", "--families", "llama"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("WRONG: 0 ") and "--seed 7 --count 1 --families llama" in out
