"""A training step whose tiers fail is right, or says what failed and where; and every wait between transfers is needed."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import fuzz_offload

DEGRADE = ("disk full", "write error", "tiers too small", "disk worn")
"""Faults after which there is a higher tier; after the others a step has to stop."""


def judge(fault: str | None, seeds: range) -> None:
    cases = [fuzz_offload.run_case(seed, fault) for seed in seeds]
    outcomes = Counter(outcome for outcome, _ in cases)
    allowed = {"exact"} if fault is None else {"exact", "degraded"} if fault in DEGRADE else {"exact", "stopped"}
    assert set(outcomes) <= allowed, outcomes
    hit = [outcome for outcome, happened in cases if happened]
    assert fault is None or hit and (fault == "flipped byte" or "exact" not in hit), cases  # a byte may flip in what is never read again


@pytest.mark.parametrize("fault", [None, *fuzz_offload.FAULTS])
def test_a_step_is_exact_or_says_why_not(fault):
    judge(fault, range(2))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, *fuzz_offload.FAULTS])
def test_hundreds_of_steps_are_exact_or_say_why_not(fault):
    judge(fault, range(100, 400 if fault is None else 150))


@pytest.mark.slow
def test_the_disk_may_be_full_at_any_write():
    outcomes = Counter(fuzz_offload.run_case(7, "disk full", at=at)[0] for at in range(1, 100))
    assert set(outcomes) <= {"exact", "degraded"} and outcomes["degraded"] > 40, outcomes


@pytest.mark.parametrize("wait", fuzz_offload.HERE)
def test_a_step_without_one_of_the_waits_is_noticed(wait):
    noticed, of = fuzz_offload.caught_of(wait, seed=0, most=60, enough=1)
    assert noticed, f"{of} steps without {wait!r} were exact"


def test_the_table_counts_what_was_drawn(tmp_path, capsys):
    out = tmp_path / "out.json"
    sizes = ["--schedules", "1", "--faults", "2", "--kills", "1", "--waits", "0"]
    assert fuzz_offload.main([*sizes, "--path", str(tmp_path), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["rows"]["no fault"]["exact"] == 1 and result["rows"]["disk full"]["drawn"] == 1
    assert result["kills"] == {"exact": 1, "clean": 1}
    assert "1 left nothing behind, 1 starts exact" in capsys.readouterr().out
