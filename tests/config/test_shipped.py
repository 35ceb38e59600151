"""The configurations in `configs/` load, say what they measured or are predicted to need, and are what they say they are."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longtrain import cli
from longtrain.config import load_config
from longtrain.plan import Plan
from longtrain.planner.asked import Asked
from longtrain.planner.cost import peak, step_memory
from longtrain.planner.footprint import measure_model
from longtrain.planner.rates import usual_rates
from longtrain.planner.shapes import on_meta
from longtrain.planner.smallest import smallest_plan
from longtrain.train.output import read_metrics

CONFIGS = Path(__file__).parents[2] / "configs"
PREDICTED = re.compile(r"# Predicted, not measured: peak ([0-9.]+) GiB")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_configs_load_and_state_their_command_and_what_they_measured_or_predict(file):
    load_config(file)
    header = file.read_text().split("\n\n")[0]
    assert "# Measured" in header or PREDICTED.search(header)
    assert f"longtrain train configs/{file.name}" in header


def test_the_quickstart_sees_16k_tokens_in_one_layer_for_half_of_its_updates():
    config, _ = load_config(CONFIGS / "quickstart.yaml")
    windows = config.model.window or (None,)
    stages = config.stages()
    assert any(w is None or w >= config.data.seq_len for w in windows[: config.model.num_layers])
    assert stages[-1].seq_len >= 16_384
    assert 2 * (config.train.steps - stages[-1].from_step) >= config.train.steps


@pytest.mark.parametrize(
    "name", ["llama_1b_32k_1gpu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama3_8b_128k_1gpu", "llama3_8b_1m_1xh100"))]
)
def test_predicted_peaks_are_the_planner_s(name):
    """From shapes alone, as on a GPU; with the float32 masters that the planner finds there already."""
    config, _ = load_config(CONFIGS / f"{name}.yaml")
    footprint = replace(measure_model(on_meta(config.model, torch.bfloat16)), device=torch.device("cuda"))
    masters = 4 * footprint.trained
    if config.memory.optimizer == "host":
        footprint, masters = replace(footprint, optimizer=0), 0
    tokens = config.data.seq_len
    least = smallest_plan(Asked(footprint, tokens, 1, config.memory.tiers(), usual_rates(footprint.device), 1))[0]
    plan = Plan(**config.memory.plan_settings()) if config.memory.budget is None else least
    total = peak(step_memory(footprint, plan, tokens, slow_tiers=True)).total + masters
    stated = float(PREDICTED.search((CONFIGS / f"{name}.yaml").read_text())[1])
    assert stated == pytest.approx(total / 2**30, abs=0.06)


@pytest.mark.slow
def test_the_predicted_peak_of_each_of_eight_processes_is_the_planner_s_for_their_part():
    """Of the tokens and chunks an eighth; of weights, gradients and moments in float32 too. Gathered in bfloat16: embedding and head with
    their gradients, a segment and the one fetched ahead; the segment's gradients twice in float32, once in bfloat16, once on their way."""
    file = CONFIGS / "llama3_8b_1m_8gpu.yaml"
    config, _ = load_config(file)
    model, ranks = config.model, config.parallel.cp_ulysses
    footprint = measure_model(on_meta(model, torch.bfloat16))
    parameters, layer, plan = footprint.parameters // 2, footprint.layers[0], Plan(**config.memory.plan_settings())
    in_layer = layer.parameters // 2
    activations = replace(
        footprint, layers=(replace(layer, parameters=0, parameter_gradients=0, delivered_gradients=0),) * model.num_layers, parameters=0,
        trained=0, other_gradients=0, embedding_sums=0, optimizer=0, head_gradients=0, head_delivered=0, device=torch.device("cuda"),
    )  # fmt: skip
    own = replace(plan, chunk_tokens=plan.chunk_tokens // ranks)
    outside = parameters - model.num_layers * in_layer
    total = peak(step_memory(activations, own, config.data.seq_len // ranks)).total + 16 * parameters // ranks
    total += (2 + 2) * outside + (2 * 2 + 2 * 4 + 2 + 4) * plan.segment_layers * in_layer
    assert float(PREDICTED.search(file.read_text())[1]) == pytest.approx(total / 2**30, abs=0.06)


@pytest.mark.slow
def test_a_model_trained_for_it_recalls_what_it_was_given(tmp_path):
    """configs/recall.yaml as it is: more than 90% right at every distance, where a guess is right 3.1% of the time."""
    assert cli.main(["train", str(CONFIGS / "recall.yaml"), f"output.dir={tmp_path}"]) == 0
    *_, last = (r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "validation")
    assert [p["distance"] for p in last["probes"]] == [16, 64, 128, 254]
    assert all(p["accuracy"] > 0.9 and p["chance"] == 1 / 32 for p in last["probes"])
    positions = [p["loss"] for p in last["positions"]]
    assert positions == sorted(positions, reverse=True)
