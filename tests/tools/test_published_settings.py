"""Published numbers: predicted within the bounds, or said why not."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import published_settings as tool


@pytest.mark.parametrize("number", range(len(tool.SETTINGS)))
def test_what_was_published_is_predicted(number):
    setting = tool.SETTINGS[number]
    _, good = tool.judged(setting, tool.predict(setting)[setting.unit])
    assert good or setting.known


@pytest.mark.parametrize("unit, value, found, said", [
    ("s", 100.0, 119.0, ("+19%", True)), ("s", 100.0, 79.0, ("-21%", False)), ("GB at most", 80.0, 40.0, ("fits", True)),
    ("GB at most", 80.0, 81.0, ("does not fit", False)),
])  # fmt: skip
def test_an_error_is_judged(unit, value, found, said):
    assert tool.judged(tool.Setting("", "", "llama3-8b", "h100", 1, 1, unit, value), found) == said
