"""Where metrics go: the lines, the extras behind the same interface, what is recorded of the machine, and the FLOP rule."""

import json
import sys
import types

import pytest
import torch

from longtrain import cli
from longtrain.config import dump_config, load_config
from longtrain.data.packing import Batch
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.train.flops import costs_of, measure_rate, update_flops, visible_pairs
from longtrain.train.metrics import JsonLines, TensorBoard
from longtrain.train.output import read_metrics
from longtrain.train.provenance import git_commit

pytestmark = pytest.mark.usefixtures("no_picture")


def test_the_record_of_a_run_says_where_it_came_from(config_file, out, capsys):
    assert cli.main(["train", str(config_file)]) == 0
    run = read_metrics(out / "metrics.jsonl")[0]
    config, _ = load_config(config_file)
    assert run["config"] == json.loads(json.dumps(run["config"])) and run["config"]["train"]["lr"] == config.train.lr
    assert run["torch"] == torch.__version__ and run["mfu_rule"].startswith("6 x matrix parameters x tokens")
    assert any(line.startswith("processor") for line in run["doctor"]) and any(line.startswith("attention") for line in run["doctor"])
    assert (out / "config.yaml").read_text() == dump_config(config)
    printed = capsys.readouterr().out
    assert "mfu     share of 1 TFLOP/s (metrics.peak_tflops) in 6 x matrix parameters" in printed and "  mfu 0." in printed


def test_a_record_is_whole_however_little_the_system_takes_at_a_time(tmp_path):
    class ThreeBytes:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            return self.file.write(data[:3])

    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.file = ThreeBytes(lines.file)
    for step in (1, 2):
        lines.write({"kind": "step", "step": step})
    lines.close()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_the_commit_is_that_of_the_checkout_or_none(tmp_path, monkeypatch):
    assert git_commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(tmp_path) is None


@pytest.mark.parametrize("name, setting", [("tensorboard", "metrics.tensorboard=true"), ("wandb", "metrics.wandb=project")])
def test_an_extra_that_is_not_installed_is_said_with_its_install_command(name, setting, config_file, out, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.main(["train", str(config_file), setting]) == 2
    error = capsys.readouterr().err
    assert f"metrics.{name}: {name} is not installed" in error and f"pip install longtrain[{name}]" in error and error.count("\n") == 1
    assert not out.exists()


class Stand:
    """Stands for TensorBoard's writer and for a run of wandb: keeps what it is told."""

    def __init__(self, *args, **kwargs):
        self.made, self.told = (args, kwargs), []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.told.append((name, *args))


def test_tensorboard_gets_numbers_by_step_and_purges_what_is_done_again(config_file, out, monkeypatch, crash_after, capsys):
    made = []
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda *args, **kwargs: made.append(Stand(*args, **kwargs)) or made[-1]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    arguments = ["train", str(config_file), "metrics.tensorboard=true", "checkpoint.every_steps=2"]
    with monkeypatch.context() as inner:
        original = __import__("longtrain.train.loop", fromlist=["Trainer"]).Trainer

        def dying(self, update=original.update):
            update(self)
            if self.done == 3:
                raise SystemExit

        inner.setattr(original, "update", dying)
        with pytest.raises(SystemExit):
            cli.main(arguments)
    assert cli.main(arguments) == 0
    assert made[0].made == ((str(out / "tensorboard"),), {"purge_step": 1}) and made[1].made[1] == {"purge_step": 3}
    losses = [call[2:] for call in made[1].told if call[:2] == ("add_scalar", "step/loss")]
    assert losses == [(r["loss"], r["step"]) for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "step" and r["step"] > 2]
    assert made[1].told[-1] == ("close",)


def test_tensorboard_itself_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path, 0)
    sink.write({"kind": "run", "unigram": 3.0})
    sink.write({"kind": "step", "step": 7, "loss": 1.5, "documents": ["a"]})
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["step/loss"]
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(7, 1.5)]


def test_wandb_gets_one_run_over_all_starts(config_file, out, monkeypatch, capsys):
    made = []
    module = types.ModuleType("wandb")
    module.init = lambda **kwargs: made.append(Stand(**kwargs)) or made[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    arguments = ["train", str(config_file), "metrics.wandb=long"]
    assert cli.main(arguments) == 0 and cli.main([*arguments, "train.steps=6"]) == 0
    assert made[0].made[1]["id"] == made[1].made[1]["id"] == (out / "wandb.id").read_text().strip() and made[0].made[1]["project"] == "long"
    logged = [call[1] for call in made[1].told if call[0] == "log"]
    assert [r["step"] for r in logged if "step/loss" in r] == [5, 6] and made[1].told[-1] == ("finish",)


@pytest.mark.parametrize("tokens, window, pairs", [(1, None, 1), (5, None, 15), (5, 2, 9), (5, 9, 15), (3, 1, 3)])
def test_visible_pairs_are_those_of_the_mask(tokens, window, pairs):
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    mask = (distance >= 0) & (distance < (window or tokens))
    assert visible_pairs(tokens, window) == int(mask.sum()) == pairs


def test_model_flops_are_those_that_torch_counts_in_a_full_attention(config_file):
    """One document, window beyond it, masks counted away: torch's counter sees every pair of an attention by matrix products, twice
    ours."""
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(vocab_size=64, num_layers=2, hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=1)
    tokens = 32
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    batch = Batch(ids, ids, torch.tensor([0, tokens], dtype=torch.int32), ("a",))
    linear = sum(p.numel() for n, p in LanguageModel(config).named_parameters() if p.ndim == 2 and "embed" not in n)
    head_dim, heads = config.resolved_head_dim, config.num_heads
    q, k, v = (torch.randn(1, heads, tokens, head_dim, requires_grad=True) for _ in range(3))
    x = torch.randn(tokens, 16, requires_grad=True)
    weight = torch.randn(16, linear // 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (x @ weight).sum().backward()
    parameters_flops = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        ((q @ k.transpose(-1, -2)) @ v).sum().backward()
    every_pair = counter.get_total_flops() * config.num_layers
    expected = parameters_flops + every_pair * (tokens + 1) / 2 / tokens
    assert update_flops(costs_of(LanguageModel(config)), [batch]) == pytest.approx(expected)


def test_linear_attention_of_transformers_sees_no_pairs():
    transformers = pytest.importorskip("transformers")
    kinds = ["linear_attention", "full_attention"]
    described = transformers.AutoConfig.for_model(
        "qwen3_next", vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, layer_types=kinds, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(described)
    assert costs_of(model).attention == ((16, None),)


def test_the_measured_rate_is_a_rate():
    assert 1e8 < measure_rate(torch.device("cpu"), torch.float32) < 1e16
