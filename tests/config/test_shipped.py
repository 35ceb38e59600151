"""The configurations in `configs/` load, and the quickstart is the long-sequence run that it says it is."""

from pathlib import Path

import pytest

from longtrain.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_configs_load_and_state_what_they_measured(file):
    load_config(file)
    assert "# Measured" in file.read_text()


def test_the_quickstart_sees_16k_tokens_in_one_layer_for_half_of_its_updates():
    config, _ = load_config(CONFIGS / "quickstart.yaml")
    windows = config.model.window or (None,)
    stages = config.stages()
    assert any(w is None or w >= config.data.seq_len for w in windows[: config.model.num_layers])
    assert stages[-1].seq_len >= 16_384
    assert 2 * (config.train.steps - stages[-1].from_step) >= config.train.steps
