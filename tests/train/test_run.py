"""Whole runs through the command: what they write, that they repeat, and how they stop."""

import builtins
import errno
import json
import math
import os
import resource

import pytest

from longtrain import cli
from longtrain.config import load_config
from longtrain.data.baselines import Baselines
from longtrain.nn import LanguageModel
from longtrain.train.console import verdict
from longtrain.train.optimizer import Optimizer
from longtrain.train.output import read_metrics


@pytest.fixture(autouse=True)
def unless_it_is_about_the_picture(request):
    if "plot" not in request.function.__name__:
        request.getfixturevalue("no_picture")


def train(file, *overrides):
    return cli.main(["train", str(file), *overrides])


def losses(directory):
    return [(r["kind"], r["step"], r["loss"]) for r in read_metrics(directory / "metrics.jsonl") if r["kind"] in ("step", "validation")]


def test_a_run_writes_weights_metrics_plot_and_the_config_that_repeats_it(config_file, out, capsys):
    pytest.importorskip("matplotlib")
    assert train(config_file) == 0
    assert sorted(p.name for p in out.iterdir()) == ["checkpoints", "config.yaml", "lock", "loss.png", "metrics.jsonl", "model.safetensors"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [(kind, step) for kind, step, _ in losses(out)] == [
        ("step", 1), ("step", 2), ("validation", 2), ("step", 3), ("step", 4), ("validation", 4),
    ]  # fmt: skip
    config, _ = load_config(config_file)
    assert load_config(out / "config.yaml")[0] == config
    model = LanguageModel(config.model)
    model.load_safetensors(out / "model.safetensors")
    printed = capsys.readouterr().out
    for part in (
        "step 4/4  T 64  loss ",
        "grad norm ",
        "tokens/s",
        "peak ",
        "ETA ",
        "bits a byte",
        "bigram counts",
        "unigram counts",
        "verdict: ",
    ):
        assert part in printed


@pytest.mark.parametrize(
    "overrides", [(), ("memory.chunk_tokens=24",), ("train.dtype=bfloat16", "model.attention_dropout=0.1", "memory.chunk_tokens=24")]
)
def test_the_same_seed_gives_the_same_losses_bit_for_bit(overrides, config_file, tmp_path, capsys):
    for name in ("a", "b"):
        assert train(config_file, f"output.dir={tmp_path / name}", *overrides) == 0
    assert train(config_file, f"output.dir={tmp_path / 'c'}", "train.seed=1", *overrides) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_streamed_and_plain_runs_have_the_same_losses_up_to_rounding(config_file, tmp_path, capsys):
    settings = ("train.tokens_per_update=128", "train.eps=1e-3")  # with 1e-8, rounding in a gradient of nothing else moves a weight by lr
    assert train(config_file, f"output.dir={tmp_path / 'plain'}", *settings) == 0
    assert train(config_file, f"output.dir={tmp_path / 'streamed'}", *settings, "memory.chunk_tokens=24") == 0
    for (*_, plain), (*_, streamed) in zip(losses(tmp_path / "plain"), losses(tmp_path / "streamed"), strict=True):
        assert streamed == pytest.approx(plain, rel=1e-4)


def test_a_budget_chooses_the_plan_and_stands_beside_the_peak(config_file, out, capsys):
    assert train(config_file, "memory.budget=8GiB", "train.steps=1") == 0
    printed = capsys.readouterr().out
    assert "predicted peak " in printed and " of 8.00 GiB" in printed
    run = read_metrics(out / "metrics.jsonl")[0]
    assert run["budget_bytes"] == 8 * 2**30 and run["plan"]["chunk_tokens"] <= 64


def test_a_budget_that_nothing_fits_is_the_config_s_error(config_file, out, capsys):
    assert train(config_file, "memory.budget=1MiB") == 2
    error = capsys.readouterr().err
    assert error.startswith("command line: memory.budget: no plan ") and "; set the budget to " in error and error.count("\n") == 1
    assert not out.exists()


def test_the_length_schedule_changes_the_sequences(config_file, out, capsys):
    schedule = "train.length_schedule=[{from_step: 0, seq_len: 16}, {from_step: 1, seq_len: 32}, {from_step: 3, seq_len: 64}]"
    assert train(config_file, schedule, "train.tokens_per_update=64") == 0
    steps = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "step"]
    assert [(r["seq_len"], r["tokens"]) for r in steps] == [(16, 64), (32, 64), (32, 64), (64, 64)]


def test_training_learns_and_the_verdict_counts_in_the_same_targets(config_file, out, capsys):
    assert train(config_file, "train.steps=60", "train.tokens_per_update=256", "train.validate_every=null") == 0
    result = next(r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "result")
    assert result["validation_loss"] < result["unigram"] - 0.3
    assert result["bits_per_byte"] == result["validation_loss"] / math.log(2)


def test_the_verdict_names_what_tokens_are_and_which_side_the_loss_is_on():
    counted = Baselines(unigram=3.0, bigram=2.0, unigram_k=1.0, bigram_k=1.0)
    said = verdict(2.5, 10, counted, "token")
    assert "2.5000 nats a token = 3.607 bits a token" in said and "byte" not in said
    assert "the model is 0.5000 above, that is, it is worse" in said and "the model is 0.5000 below" in said


def test_a_run_is_not_overwritten_unless_asked(config_file, out, capsys):
    assert train(config_file) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert train(config_file, "train.seed=5") == 2
    line = next(number for number, text in enumerate(config_file.read_text().splitlines(), 1) if "dir:" in text)
    assert capsys.readouterr().err.startswith(f"{config_file}:{line}: output.dir: {out} already holds a finished run of 4 steps; ")
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert train(config_file, "train.seed=5", "output.overwrite=true") == 0
    assert (out / "model.safetensors").read_bytes() != before[out / "model.safetensors"]


def test_a_loss_that_is_not_finite_stops_with_step_and_documents_and_keeps_the_weights(config_file, out, texts, monkeypatch, capsys):
    assert train(config_file, "train.steps=1") == 0
    before = (out / "model.safetensors").read_bytes()
    capsys.readouterr()
    update = Optimizer.update

    def poison(self, *args):
        update(self, *args)
        self.parameters[0].data.fill_(float("inf"))

    monkeypatch.setattr(Optimizer, "update", poison)
    assert train(config_file, "output.overwrite=true") == 1
    error = capsys.readouterr().err
    assert "step 2: the loss is nan" in error and f"{texts}/" in error and "lower train.lr" in error and error.count("\n") == 1
    assert (out / "model.safetensors").read_bytes() == before
    assert not list(out.glob(".*"))


def test_a_gradient_that_is_not_finite_stops_before_the_update(config_file, out, capsys):
    assert train(config_file, "train.lr=1e30", "train.grad_clip=null") == 1
    assert "step 2: the gradient norm is " in capsys.readouterr().err
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["data.files=[nowhere/*.txt]"], "nowhere/*.txt names no file"),
        (["data.min_document_tokens=100000"], "lower that setting"),
        (["model.vocab_size=100"], "is outside the vocabulary of 100"),
    ],
)
def test_bad_data_is_said_in_one_line_and_nothing_is_written(overrides, said, config_file, out, capsys):
    assert train(config_file, *overrides) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not out.exists()


def test_an_empty_file_is_an_empty_data_set(config_file, tmp_path, out, capsys):
    (tmp_path / "empty.txt").touch()
    assert train(config_file, f"data.files=[{tmp_path / 'empty.txt'}]") == 1
    assert "all empty" in capsys.readouterr().err and not out.exists()


def test_a_directory_that_cannot_be_made_is_said_plainly(config_file, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert train(config_file, f"output.dir={tmp_path / 'file' / 'out'}") == 1
    error = capsys.readouterr().err
    assert "cannot be written (Not a directory)" in error and "set output.dir" in error and error.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_directory_is_said_plainly(config_file, out, capsys):
    out.mkdir(mode=0o500)
    assert train(config_file) == 1
    assert "cannot be written (Permission denied)" in capsys.readouterr().err


def test_a_disk_that_fills_up_while_saving_leaves_the_old_weights_and_no_part(config_file, out, monkeypatch, capsys):
    assert train(config_file, "train.steps=1") == 0
    before = (out / "model.safetensors").read_bytes()
    capsys.readouterr()

    def fill(self, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LanguageModel, "save_safetensors", fill)
    assert train(config_file, "output.overwrite=true") == 1
    error = capsys.readouterr().err
    assert f"{out / 'model.safetensors'} cannot be written (No space left on device); make room" in error
    assert (out / "model.safetensors").read_bytes() == before and not list(out.glob(".*"))


def test_a_file_that_the_system_cuts_off_is_said_plainly(config_file, out, capsys):
    """The real thing, by the system's limit on file sizes: the metrics stay whole lines."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        assert train(config_file, "train.steps=40", "train.warmup_steps=0") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert f"{out / 'metrics.jsonl'} cannot be written (File too large); make room" in error and error.count("\n") == 1
    lines = (out / "metrics.jsonl").read_bytes().split(b"\n")
    assert lines[-1] == b"" and len(lines) > 3
    for line in lines[:-1]:
        json.loads(line)


def test_without_matplotlib_the_run_ends_well_and_says_how_to_get_the_plot(config_file, out, monkeypatch, capsys):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert train(config_file) == 0
    assert "pip install longtrain[plot]" in capsys.readouterr().out
    assert not (out / "loss.png").exists()
