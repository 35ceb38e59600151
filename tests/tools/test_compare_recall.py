"""Recall beyond every window: the hybrid finds it, the same model with windows only does not, and the tool says so."""

import sys
from pathlib import Path

import pytest

from longtrain.config import load_config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from compare_recall import CONFIGS, Recall, draw, main, reach, table  # noqa: E402

HYBRID, WINDOWS = (ROOT / path for path in CONFIGS)


def test_the_pair_differs_in_one_layer_and_asks_beyond_every_window():
    hybrid, windows = (load_config(path)[0] for path in (HYBRID, WINDOWS))
    assert hybrid.model.layers == ("conv", "attention", "window") and windows.model.layers == ("conv", "window", "window")
    assert (reach(hybrid.model), reach(windows.model)) == (None, 3 + 31 + 31)
    assert (hybrid.data, hybrid.train, hybrid.eval) == (windows.data, windows.train, windows.eval)
    assert min(hybrid.eval.distances) < reach(windows.model) < hybrid.eval.distances[1]


@pytest.mark.parametrize(
    "changes, tokens",
    [
        (["model.layers=[window]", "model.window=[5, 9]", "model.conv_taps=128"], 4 + 8 + 4),
        (["model.layers=[conv, conv]", "model.window=null", "model.conv_taps=2"], 3),
        (["model.layers=[conv, window]", "model.conv_implicit=true"], None),
        (["model.layers=[conv, window, delta]"], None),
    ],
)
def test_reach(changes, tokens):
    assert reach(load_config(HYBRID, changes)[0].model) == tokens


def test_the_table_has_a_line_a_run_and_chance(tmp_path):
    found = [
        Recall(name="a", kinds=("conv", "attention"), reach=None, chance=1 / 32, accuracy={16: 1.0, 2046: 0.995}),
        Recall(name="b", kinds=("window",), reach=65, chance=1 / 32, accuracy={16: 0.5}),
    ]
    head, first, second, chance = table(found).splitlines()
    assert head.split() == ["tokens", "back", "layers", "reach", "16", "2,046"]
    assert first.split() == ["a", "conv,", "attention", "all", "100.0%", "99.5%"]
    assert second.split() == ["b", "window", "65", "50.0%"] and chance.split() == ["chance", "3.1%", "3.1%"]
    pytest.importorskip("matplotlib")
    draw(found, tmp_path / "new" / "recall.png")
    assert (tmp_path / "new" / "recall.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_hybrid_recalls_beyond_the_windows_where_windows_alone_do_not(one_thread, tmp_path, capsys):
    """With fewer updates and questions than the configs. A guess that is right 3.1% of the time is so in 9.4% of 128 answers once in
    10,000."""
    shorter = ["train.steps=500", "train.validate_every=500", "eval.distances=[128, 254]", "train.threads=1", "train.kernel_fallback=warn"]
    assert main([str(HYBRID), str(WINDOWS), "--dir", str(tmp_path), "--picture", str(tmp_path / "recall.png"), "--set", *shorter]) == 0
    head, hybrid, windows, chance = capsys.readouterr().out.splitlines()[-4:]
    assert chance.split() == ["chance", "3.1%", "3.1%"]
    assert all(float(right[:-1]) >= 90 for right in hybrid.split()[-2:])
    assert all(float(right[:-1]) <= 9.4 for right in windows.split()[-2:])
