"""The benchmark of the token store runs, compares before it measures, and fails below its bound."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import bench_offload
import bench_offload_step
from gpu_check_offload import race_rows


@pytest.fixture
def small(disk, tmp_path):
    sizes = ["--bytes", "4MiB", "--extent", "512KiB", "--staging", "4MiB", "--rounds", "2"]
    return ["--path", disk, *sizes, "--out", str(tmp_path / "out.json")]


def test_both_directions_are_measured(small, capsys, tmp_path):
    assert bench_offload.main([*small, "--bound", "0"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result["rows"]) == {"write", "read"} and all(row["ratio"] > 0 for row in result["rows"].values())
    assert "GB/s" in capsys.readouterr().out


def test_below_the_bound_is_a_failure(small, capsys):
    assert bench_offload.main([*small, "--bound", "1000"]) == 1


def test_no_number_where_bytes_differ(small, monkeypatch):
    right = bench_offload.TieredStore.get
    monkeypatch.setattr(bench_offload.TieredStore, "get", lambda self, *a: right(self, *a) + 1)
    with pytest.raises(SystemExit, match="no numbers"):
        bench_offload.main(small)


@pytest.mark.parametrize("mode", [
    ["--variants", "memory", "disk", "--rounds", "0"],
    pytest.param(["--rounds", "2"], marks=pytest.mark.slow),
])  # fmt: skip
def test_a_step_is_measured_with_and_without_the_disk(small, capsys, tmp_path, mode):
    sizes = ["--seq-len", "512", "--layers", "2", "--chunk", "128", "--staging", "1MiB", "--out", str(tmp_path / "out.json"), *mode]
    assert bench_offload.main(["step", "--path", str(tmp_path), *sizes, "--memory-bound", "1000", "--time-bound", "1000"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {"memory", "disk"} <= set(rows)
    assert rows["memory"]["gradients"] == rows["disk"]["gradients"] and rows["disk"]["written"] > 512 * 256 * 4
    assert "waited" in capsys.readouterr().out


def test_steps_that_differ_give_no_numbers(small, monkeypatch, capsys, tmp_path):
    row = {"loss": 1.0, "norm": 2.0, "gradients": "a"}
    monkeypatch.setattr(bench_offload_step, "measure", lambda a: {"memory": row, "disk": row | {"gradients": "b"}})
    assert bench_offload.main(["step", "--path", str(tmp_path)]) == 1
    assert "no numbers" in capsys.readouterr().out


def test_race_rows_on_a_cpu():
    assert all(passed for *_, passed in race_rows("cpu"))
