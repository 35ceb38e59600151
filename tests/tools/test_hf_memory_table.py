"""The table of bytes a token: what is measured is what is predicted, to the byte."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason='needs pip install "longtrain[hf]"')
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import hf_memory_table


@pytest.mark.slow
@pytest.mark.parametrize("plan", hf_memory_table.PLANS)
def test_every_part_is_as_predicted(plan):
    settings = hf_memory_table.PLANS[plan]
    expected, measured = hf_memory_table.predicted(settings), hf_memory_table.per_token(8, settings)
    assert {part: measured[part] for part in expected} == pytest.approx(expected, abs=1)
    assert measured[hf_memory_table.PEAKS[1]] == pytest.approx(sum(expected.values()), abs=1)


@pytest.mark.slow
def test_a_part_that_is_off_stops_the_command(monkeypatch):
    monkeypatch.setattr(hf_memory_table, "PLANS", {"outputs computed again": dict(store_outputs=0.0)})
    monkeypatch.setattr(hf_memory_table, "predicted", lambda plan: dict.fromkeys(hf_memory_table.PARTS, 1.0))
    with pytest.raises(SystemExit, match="layer inputs: predicted 1, measured 294,912"):
        hf_memory_table.main([])
