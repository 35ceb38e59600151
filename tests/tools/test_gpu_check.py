"""The GPU check on a machine without a GPU: it says so, and a dry run on the CPU exercises its code."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import gpu_check
import gpu_check_rows
from gpu_check_shapes import Row, Sizes

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@needs_no_gpu
def test_without_a_gpu_it_says_so_in_one_line(capsys, tmp_path):
    assert gpu_check.main(["--out", str(tmp_path)]) == 3
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 and "sees no GPU" in out and not list(tmp_path.iterdir())


def test_dry_run_of_a_section_writes_json_and_markdown(capsys, tmp_path):
    assert gpu_check.main(["--dry-run-cpu", "--only", "ceilings", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [row["name"] for row in result["rows"]] == [
        "bf16 matmul, 64 cubed", "copy on the device, read and written", "pinned copy, host to device", "pinned copy, device to host"]
    assert "dry run" in result["title"] and "| bf16 matmul" in (tmp_path / "gpu_check.md").read_text()


@pytest.mark.slow
def test_dry_run_of_everything(tmp_path):
    assert gpu_check.main(["--dry-run-cpu", "--row-seconds", "3600", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    assert {row["section"] for row in rows} == set(gpu_check_rows.SECTIONS)


def test_a_section_without_a_row_in_time_is_ended_and_reported():
    rows = gpu_check.run_section("ceilings", True, row_seconds=0.01, left=100)
    assert rows[-1].passed is False and "no row within" in rows[-1].note
    rows = gpu_check.run_section("ceilings", True, row_seconds=100, left=0.01)
    assert rows[-1].passed is None and "used up" in rows[-1].note


def test_a_section_that_breaks_is_reported_with_its_error(capsys):
    rows = gpu_check.run_section("ceilings; nothing", True, row_seconds=3600, left=3600)
    assert len(rows) == 1 and rows[0].passed is False and "invalid choice" in rows[0].note


def test_no_speed_is_measured_where_results_are_wrong(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_check, "run_section", lambda section, *a: [Row(section=section, name="gradients", passed=False)])
    assert gpu_check.main(["--dry-run-cpu", "--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    for row in rows:
        assert (row["passed"] is None and "results above are wrong" in row["note"]) == (row["section"] in gpu_check_rows.SPEED_SECTIONS)


def test_a_wrong_attention_backend_gives_a_wrong_row(monkeypatch):
    right = gpu_check_rows.attention
    monkeypatch.setattr(
        gpu_check_rows, "attention", lambda *a, backend, **o: right(*a, backend=backend, **o) * (1 if backend == "reference" else 1.05)
    )
    first = next(gpu_check_rows.attention_rows(Sizes.tiny_cpu()))
    assert first.passed is False


@pytest.mark.parametrize(
    "section", ["attn speed", "replay", "layer", "long layer", "model", "long conv", "linear", "conv speed", "linear speed"]
)
def test_sections_run_at_tiny_sizes(section):
    rows = list(gpu_check_rows.SECTIONS[section](Sizes.tiny_cpu()))
    assert rows and all(row.section == section and row.passed is not False and (row.measured or row.note) for row in rows)


@pytest.mark.parametrize("section", ["layer", "long layer", "model"])
def test_what_does_not_fit_is_skipped_with_the_reason(section, monkeypatch):
    monkeypatch.setattr(Sizes, "lacks", lambda self, needed: f"skipped: needs {needed} bytes")
    rows = list(gpu_check_rows.SECTIONS[section](Sizes.tiny_cpu()))
    assert rows[0].note.startswith("skipped: needs") and rows[0].passed is None and not rows[0].measured


def test_a_replay_that_differs_gives_a_wrong_row(monkeypatch):
    monkeypatch.setattr(
        gpu_check_rows.lt.nn.LanguageModel, "forward", lambda self, **o: (_ for _ in ()).throw(RuntimeError("replayed k differs"))
    )
    row = next(gpu_check_rows.replay_rows(Sizes.tiny_cpu()))
    assert row.passed is False and "differs" in row.measured
