"""tools/bench_long_conv.py runs, and times nothing that is wrong."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import bench_long_conv

SMALL = ["bench_long_conv.py", "--small", "--clock", "cpu", "--cases"]


def test_a_case_has_its_row(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*SMALL, "taps-8", "packed"])
    bench_long_conv.main()
    head, *rows = capsys.readouterr().out.splitlines()[-3:]
    assert "x faster" in head and [row.split()[0] for row in rows] == ["taps-8", "packed"]


def test_what_is_wrong_is_not_timed(monkeypatch):
    right = bench_long_conv.long_conv
    monkeypatch.setattr(bench_long_conv, "long_conv", lambda u, **x: right(u, **x) * (1 if x.get("backend") == "reference" else 1.01))
    monkeypatch.setattr(sys, "argv", [*SMALL, "taps-8"])
    with pytest.raises(SystemExit, match="taps-8: y of ours is off by .* not timed"):
        bench_long_conv.main()


def test_fast_lengths_have_small_factors():
    for needed in (1, 2, 17, 1000, 4097, 131_071):
        found = bench_long_conv.fast_length(needed)
        assert found >= needed and found % 2 == 0
        for factor in (2, 3, 5):
            while found % factor == 0:
                found //= factor
        assert found == 1
