"""The search for the longest length: what it answers for known memory, and one real run."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import longest_sequence


def arguments(*more):
    return longest_sequence.arguments(["--budget", "768MiB", "--chunk", "512", *more])


@pytest.mark.parametrize(
    "fixed, slope, bend", [(100e6, 110e3, 0), (264e6, 5e3, 0), (50e6, 40e3, 0.2), (700e6, 100e3, 0), (900e6, 10e3, 0)]
)
def test_the_answer_fits_and_the_next_does_not(fixed, slope, bend):
    """`bend`: what the line does not know of, as of buffers that come in steps."""
    a = arguments()

    def measure(method, task):
        needed = fixed + slope * task.tokens + bend * slope * (task.tokens // 8192 * 8192)
        return None if needed > 1.5 * a.budget else needed

    found = longest_sequence.longest("streamed", a, measure)
    runs, answer = found["runs"], found["longest"]
    fitting = [t for t, m in runs.items() if m is not None and m <= a.budget]
    assert answer == max(fitting, default=0)
    refused = min(t for t in runs if t not in fitting)
    assert refused - answer <= max(0.02 * refused, a.chunk) and len(runs) <= 9, runs


@pytest.mark.parametrize("budget", ["-3GiB", "0", "much"])
def test_a_budget_that_is_none_is_said_plainly(budget, capsys):
    with pytest.raises(SystemExit):
        longest_sequence.arguments([f"--budget={budget}"])
    assert f"--budget: '{budget}' is no" in capsys.readouterr().err


def test_no_search_beyond_the_longest():
    a = arguments("--longest", "65536")
    found = longest_sequence.longest("streamed", a, lambda method, task: 1000 + task.tokens)
    assert found["longest"] == max(found["runs"]) == 65536


def test_a_search_goes_on_where_it_was_and_methods_add_up(tmp_path, monkeypatch):
    slopes, ran = {"checkpoint": 110e3, "streamed": 5e3}, []

    def measure(method, task):
        ran.append((method, task.tokens))
        if len(ran) == 4:
            raise KeyboardInterrupt
        return int(50e6 + slopes[method] * task.tokens)

    monkeypatch.setattr(longest_sequence, "peak", measure)
    call = lambda *more: longest_sequence.main(["--budget", "256MiB", "--rounds", "0", "--out", str(tmp_path), *more])
    with pytest.raises(KeyboardInterrupt):
        call("--methods", "streamed")
    assert not call("--methods", "streamed") and not call("--methods", "checkpoint")
    assert len(set(ran)) == len(ran) - 1  # the one that was interrupted
    found = json.loads((tmp_path / "longest_sequence.json").read_text())
    assert list(found["methods"]) == ["checkpoint", "streamed"] and len(found["commands"]) == 2
    for method, slope in slopes.items():
        assert found["methods"][method]["longest"] == pytest.approx((256 * 2**20 - 50e6) / slope, rel=0.02, abs=512)
    runs = len(ran)
    assert not call("--methods", "streamed", "--longest", "8192", "--redo")
    assert len(ran) > runs and "at least 8,192" in (tmp_path / "longest_sequence.md").read_text()


@pytest.mark.slow
def test_a_real_search_writes_what_it_found(tmp_path):
    assert not longest_sequence.main([
        "--budget", "400MiB", "--layers", "1", "--vocab", "2048", "--chunk", "256", "--methods", "checkpoint", "checkpoint+chunked",
        "streamed", "streamed+disk", "--path", str(tmp_path), "--longest", "16384", "--rounds", "1", "--resolution", "0.2",
        "--out", str(tmp_path)])  # fmt: skip
    found = json.loads((tmp_path / "longest_sequence.json").read_text())["methods"]
    assert 0 < found["checkpoint"]["longest"] <= found["checkpoint+chunked"]["longest"] <= found["streamed"]["longest"]
    assert (tmp_path / "longest_sequence.md").exists()
