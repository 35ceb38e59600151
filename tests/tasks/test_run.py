"""`longtrain task`: settings are checked, all filter settings are trained from all seeds, and what is printed is what was recorded."""

import sys
import typing
from pathlib import Path

import pytest
import torch

from longtrain import cli
from longtrain.tasks.config import TaskConfig, load_task_config
from longtrain.tasks.data import TASKS
from longtrain.tasks.model import SequenceClassifier
from longtrain.tasks.run import summary
from longtrain.train.output import read_metrics

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "tasks").glob("*.yaml"))
SMALL = """\
task: listops
tokens: 30
train_examples: 64
test_examples: 32
width: 8
layers: 2
steps: 5
batch: 16
measure_every: 2
seeds: [0, 1]
threads: 1
out: OUT
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.replace("OUT", str(tmp_path / "out")))
    return path


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_run_records_every_model_and_prints_the_margins(config, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main(["task", str(config), "squash=[0.003, 0]"]) == 0
    head, *records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert head["kind"] == "task" and 0 < head["chance"] < 0.5
    assert [(r["seed"], r["squash"], r["step"]) for r in records] == [
        (seed, squash, step) for seed in (0, 1) for squash in (0.003, 0) for step in (2, 4, 5)
    ]
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert summary([head, *records]) in printed and "squash 0.003 less squash 0: " in printed and "less chance" in printed
    before = [r["accuracy"] for r in records]
    assert cli.main(["task", str(config), "squash=[0.003, 0]"]) == 0
    assert [r["accuracy"] for r in read_metrics(tmp_path / "out" / "metrics.jsonl")[1:]] == before


def test_margins_are_taken_seed_by_seed():
    head = {"kind": "task", "squash": [0.01, 0.0], "seeds": [0, 1], "chance": 0.1}
    accuracies = {(0, 0.01): 0.9, (0, 0.0): 0.8, (1, 0.01): 0.7, (1, 0.0): 0.72}
    records = [
        {"kind": "measurement", "seed": seed, "squash": squash, "accuracy": a - earlier}
        for earlier in (0.5, 0.0)
        for (seed, squash), a in accuracies.items()
    ]
    assert summary([head, *records]).split("\n")[2:] == [
        "squash 0.01 less squash 0: +4.0 points (standard error 6.0), better from 1 of 2 seeds",
        "squash 0.01 less chance (10.0%): +70.0 points",
    ]


def test_a_run_may_measure_on_validation_examples(config, capsys):
    assert cli.main(["task", str(config), "measure_on=validation", "seeds=[0]", "squash=[0]"]) == 0
    assert "of the validation examples" in capsys.readouterr().out


def test_the_tasks_that_can_be_named_are_those_there_are():
    assert set(typing.get_args(typing.get_type_hints(TaskConfig)["task"])) == set(TASKS)


def test_squash_reaches_the_filters():
    for squash in (0.0, 0.01):
        torch.manual_seed(0)
        model = SequenceClassifier(16, 10, 8, 1, 30, squash=squash)
        filter = model.layers[0].conv.filter
        assert float((filter() == 0).double().mean() > 0.1) == bool(squash)


def test_what_all_tokens_have_in_common_is_not_convolved():
    u_BTE, real_BT1 = torch.randn(2, 20, 8, dtype=torch.float64), torch.ones(2, 20, 1, dtype=torch.float64)
    for center in (True, False):
        layer, heard = SequenceClassifier(16, 10, 8, 1, 20, center=center).double().layers[0], []
        layer.norm, hook = torch.nn.Identity(), layer.conv.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
        for shift in (0.0, 3.0):
            layer(u_BTE + shift, real_BT1)
        hook.remove()
        assert torch.allclose(heard[0], heard[1], rtol=0, atol=1e-12) == center


@pytest.mark.parametrize("center", [True, False])
def test_padding_changes_nothing(center):
    model, ids = SequenceClassifier(16, 10, 8, 2, 40, center=center).double(), torch.randint(1, 16, (3, 20))
    torch.testing.assert_close(model(torch.nn.functional.pad(ids, (0, 15))), model(ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "override, message",
    [
        ("task=chess", "command line: task: 'chess' is not a choice"),
        ("steps=0", "steps: must be at least 1"),
        ("squash=[0.1]", "squash: must be from 0 to 0.04, found 0.1"),
        ("squash=[]", "squash: must list different values"),
        ("batch=65", "batch: 65 is more than the 64 train_examples"),
        ("speed=3", "speed=3: is not setting=value"),
        ("noise=5", "noise: is for images"),
        ("dropout=1.0", "dropout: must be from 0 to below 1"),
        ("task=pathfinder", "square image"),
    ],
)
def test_wrong_settings_end_with_a_message(config, override, message, capsys):
    assert cli.main(["task", str(config), override]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message", [("", "must hold settings"), ("task: listops\n", "tokens: is missing"), ("tusk: 1\n", "did you mean task")]
)
def test_wrong_files_end_with_a_message(tmp_path, text, message, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert cli.main(["task", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_without_scikit_learn_a_message_says_how_to_get_it(config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["task", str(config), "task=digits", "tokens=64"]) == 1
    assert "pip install longtrain[tasks]" in capsys.readouterr().err


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configs_load_and_state_what_they_measured(file):
    config = load_task_config(file)
    assert config.squash[0] > 0 and config.squash[-1] == 0 and len(config.seeds) >= 3
    header = file.read_text().split("\n\n")[0]
    assert "# Measured" in header and f"longtrain task configs/tasks/{file.name}" in header


@pytest.mark.slow
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configs_learn(file, tmp_path):
    """One model of each, with squash: 10 points above chance at the least (ListOps; the others are 40 and more)."""
    if "digits" in file.name:
        pytest.importorskip("sklearn")
    assert cli.main(["task", str(file), "seeds=[0]", "squash=[0.01]", f"out={tmp_path}"]) == 0
    head, *records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[-1]["accuracy"] > head["chance"] + 0.1
