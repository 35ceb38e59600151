"""The attention benchmark and its bounds: they run, and a missed bound is said."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import attention_bounds
import bench_attention


def test_errors_are_bounded_by_those_of_torch():
    found = list(attention_bounds.error_bounds(1, time.process_time, small=True))
    assert len(found) == 8 and all(bound.held for bound in found), found


def test_a_missed_bound_fails(monkeypatch, capsys):
    monkeypatch.setattr(attention_bounds, "_ours", lambda q, k, v: attention_bounds._sdpa(q, k, v) * 1.01)
    found = list(attention_bounds.error_bounds(1, time.process_time, small=True))
    assert not any(bound.held for bound in found if "out" in bound.name and "float32" in bound.name)
    assert attention_bounds.at_least("rate", 0.89, 0.9).held is False


def test_a_wrong_op_is_not_timed(monkeypatch):
    right = bench_attention.attention
    monkeypatch.setattr(
        bench_attention,
        "attention",
        lambda *a, backend="auto", **o: right(*a, backend=backend, **o) * (1 if backend == "reference" else 1.1),
    )
    with pytest.raises(SystemExit, match="chunk: out is off by .* not timed"):
        bench_attention.check("chunk", bench_attention.CASES["chunk"])


@pytest.mark.slow
def test_every_bound_is_computed(capsys):
    assert attention_bounds.check_bounds(1, time.process_time, small=True) == 0
    out = capsys.readouterr().out
    for word in ("fp32-8k", "bf16-4k", "d128", "gqa", "matmul", "forward", "backward", "packed", "window", "memory", "float32", "dK at"):
        assert word in out
