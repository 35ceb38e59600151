"""The tool that holds step times of other mixers against predictions runs, and says what is outside its bound."""

import importlib.util
from pathlib import Path

from longtrain.planner.machines import Machine
from longtrain.planner.rates import Rates

FILE = Path(__file__).resolve().parents[2] / "tools" / "predicted_mixers.py"


def test_a_prediction_that_is_far_off_is_marked(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("predicted_mixers", FILE)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tiers = dict.fromkeys(("host_write", "host_read", "disk_write", "disk_read"), 1e9)
    rates = Rates(flops=1e18, **tiers)  # nothing is as quick as that
    Machine(name="none", device="cpu", memory=1, rates=rates, peak_flops=1e18, source="", dtype="float32").save(tmp_path / "machine.json")
    small = ["--seq-len", "64", "--chunk", "32", "--hidden", "64", "--layers", "1", "--steps", "1", "--kinds", "delta", "conv"]
    assert tool.main(["--machine", str(tmp_path / "machine.json"), *small]) == 1
    shown = capsys.readouterr().out
    assert shown.count("-100.0% !") == 2 and "2 bounds not kept" in shown
