"""bench_parallel: every way is the same step, its bytes are counted, a slow link is waited for, and the lanes are written."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import bench_parallel
import pytest

TINY = [
    "--seq-len",
    "64",
    "--chunk",
    "32",
    "--layers",
    "1",
    "--hidden",
    "16",
    "--ffn",
    "16",
    "--vocab",
    "32",
    "--heads",
    "2",
    "--kv-heads",
    "2",
]


@pytest.mark.slow
def test_table_trace_and_a_slow_link(tmp_path):
    files = ["--out", str(tmp_path / "rows.json"), "--trace", str(tmp_path / "lanes.json")]
    assert bench_parallel.main([*TINY, "--repeats", "1", "--link", "1MB", *files]) == 0
    independent, *ways = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["way"] for row in ways] == ["heads", "ring", "queries"]
    for row in ways:
        assert 0 < row["MB received"] <= 1.01 * row["by formula"]
        assert row["seconds"] >= row["waited seconds"] and row["transfer seconds"] > 0
        assert row["MB over loopback"] >= row["MB received by all"], "more was counted than was sent"
    assert ways[0]["MB received"] == ways[0]["by formula"]
    lanes = json.loads((tmp_path / "lanes.json").read_text())
    assert {lane["pid"] for lane in lanes} >= {"ring, process 0", "ring, process 1"} and all(lane["dur"] >= 0 for lane in lanes)


@pytest.mark.slow
def test_what_is_counted_is_what_passes_over_the_loopback_interface(tmp_path):
    """Within 5%, for headers and barriers; the least of some rounds, as others may use the interface too."""
    sizes = ["--seq-len", "4096", "--chunk", "2048", "--layers", "2", "--hidden", "64", "--ffn", "16", "--vocab", "32", "--heads", "4",
             "--kv-heads", "4", "--kinds", "attention", "delta"]  # fmt: skip
    ways = ["--repeats", "5", "--ways", "heads", "states", "queries"]
    assert bench_parallel.main([*sizes, *ways, "--out", str(tmp_path / "rows.json")]) == 0
    for row in json.loads((tmp_path / "rows.json").read_text())["rows"][1:]:
        assert 1 <= row["MB over loopback"] / row["MB received by all"] <= 1.05, row
