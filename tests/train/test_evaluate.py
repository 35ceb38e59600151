"""Evaluation: by position, by source, through the command; and that documents do not see each other in it."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch

import longtrain as lt
from longtrain import cli
from longtrain.config import load_config
from longtrain.config.schema import EvalConfig
from longtrain.data.packing import Batch
from longtrain.errors import RunError
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.train.console import StepBar
from longtrain.train.evaluate import position_edges, probe_distances, validate
from longtrain.train.output import read_metrics

TOKENS = 40
SHAPE = ModelConfig(vocab_size=32, num_layers=2, hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=1, window=(7, None))


class Rows:
    """Two packed sequences: documents of 25 and 15 tokens, of 1 and 30 and 9 tokens of padding."""

    seq_len = TOKENS

    def __init__(self, change: int | None = None) -> None:
        self.ids = np.random.default_rng(0).integers(1, 32, (2, TOKENS))
        if change is not None:
            self.ids[0, change] = (self.ids[0, change] + 1) % 32
        self.edges = [(0, 25, 40), (0, 1, 31, 40)]

    def read_row(self, row: int, held=None) -> Batch:
        ids_BT = torch.from_numpy(self.ids[row])[None]
        labels_BT = ids_BT.clone()
        if row == 1:
            labels_BT[:, 31:] = -100
        return Batch(ids_BT, labels_BT, torch.tensor(self.edges[row], dtype=torch.int32), ("a", "b"), ("one", "two"))


def model(dropout: float = 0.5) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(dataclasses.replace(SHAPE, attention_dropout=dropout, initializer_range=0.3)).double()


def evaluated(rows: Rows, of: LanguageModel | None = None, which=(0, 1)):
    return validate(of or model(), rows, which, torch.device("cpu"), StepBar(io.StringIO()), EvalConfig(first_bucket=4))


def test_every_target_is_counted_once_where_it_stands_in_its_own_document():
    """Against a loop over documents, each given to the model alone."""
    rows, plain, losses = Rows(), model().eval().requires_grad_(False), {}
    for source, row, first, stop in (("one", 0, 0, 25), ("two", 0, 25, 40), ("one", 1, 0, 1), ("two", 1, 1, 31)):
        ids_BT = torch.from_numpy(rows.ids[row, first:stop])[None]
        for position in range(stop - first - 1):
            logits = plain(ids_BT[:, : position + 1]).logits[0, -1]
            losses[source, row, position] = float(torch.nn.functional.cross_entropy(logits, ids_BT[0, position + 1]))
    found = evaluated(rows)
    assert found.targets == len(losses) == 24 + 14 + 29
    assert found.loss == pytest.approx(np.mean(list(losses.values())), rel=1e-12)
    for bucket in found.positions:
        inside = [loss for (_, _, position), loss in losses.items() if bucket["start"] <= position < bucket["stop"]]
        assert bucket["targets"] == len(inside) and bucket["loss"] == pytest.approx(np.mean(inside), rel=1e-12)
        assert bucket["error"] == pytest.approx(np.std(inside) / len(inside) ** 0.5, rel=1e-9)
    assert [(b["start"], b["stop"]) for b in found.positions] == [(0, 4), (4, 8), (8, 16), (16, 32)]
    for part in found.sources:
        inside = [loss for (source, _, _), loss in losses.items() if source == part["source"]]
        assert part["targets"] == len(inside) and part["loss"] == pytest.approx(np.mean(inside), rel=1e-12)


def test_sequences_without_a_target_are_no_evaluation():
    class Prompts(Rows):
        def read_row(self, row, held=None):
            return dataclasses.replace(super().read_row(row, held), labels_BT=torch.full((1, TOKENS), -100))

    with pytest.raises(RunError, match="none of the 80 validation tokens is a target"):
        evaluated(Prompts())


@pytest.mark.parametrize("changed, untouched", [(3, "two"), (24, "two"), (25, "one"), (30, "one")])
def test_a_token_of_another_document_changes_no_bit_of_a_document_s_loss(changed, untouched):
    for streamed in (False, True):
        of = model()
        if streamed:
            lt.apply(of, lt.Plan(chunk_tokens=9, loss_chunk_tokens=6))
        before, after = ({p["source"]: p["loss"] for p in evaluated(Rows(change), of, (0,)).sources} for change in (None, changed))
        assert before[untouched] == after[untouched]
        assert before != after


def test_a_streamed_model_evaluates_as_the_plain_one():
    plain, streamed = model(), model()
    lt.apply(streamed, lt.Plan(chunk_tokens=7, loss_chunk_tokens=11))
    assert evaluated(Rows(), streamed).loss == pytest.approx(evaluated(Rows(), plain).loss, rel=1e-12)


@pytest.mark.parametrize(
    "first, tokens, edges", [(64, 512, [0, 64, 128, 256, 512]), (64, 100, [0, 64, 100]), (64, 10, [0, 10]), (1, 3, [0, 1, 2, 3])]
)
def test_buckets_double_and_end_with_the_sequence(first, tokens, edges):
    assert position_edges(first, tokens) == edges


PROBES = ("eval.probes=[recall, needle]", "eval.examples=8", "train.steps=2", "train.validate_every=1")


def test_a_run_asks_its_probes_and_eval_of_the_run_finds_the_same(config_file, out, capsys):
    assert cli.main(["train", str(config_file), *PROBES]) == 0
    last = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "validation"][-1]
    assert {p["probe"] for p in last["probes"]} == {"recall", "needle"} and all(p["chance"] > 0 for p in last["probes"])
    for given in (out, config_file):
        assert cli.main(["train", "--eval", str(given), *PROBES[:2]]) == 0
        again = json.loads((out / "evaluation.json").read_text())
        assert {k: again[k] for k in ("loss", "targets", "positions", "probes")} == {
            k: last[k] for k in ("loss", "targets", "positions", "probes")
        }
    assert "tokens back" in capsys.readouterr().out


def test_eval_reads_the_newest_checkpoint_where_a_run_has_not_ended(config_file, out, capsys):
    assert cli.main(["train", str(config_file)]) == 0
    last = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "validation"][-1]
    (out / "model.safetensors").unlink()
    assert cli.main(["train", "--eval", str(out)]) == 0
    assert json.loads((out / "evaluation.json").read_text())["loss"] == last["loss"]
    assert "weights " + str(out / "checkpoints") in capsys.readouterr().out


def test_eval_in_the_middle_of_a_length_schedule_has_the_positions_of_that_moment(config_file, out, crash_after, monkeypatch, capsys):
    stages = "train.length_schedule=[{from_step: 0, seq_len: 32}, {from_step: 3, seq_len: 64, rope_base: 1e6, rope_scaling: 4}]"
    crash_after(3)
    with pytest.raises(SystemExit):
        cli.main(["train", str(config_file), stages, "checkpoint.every_steps=2", "checkpoint.asynchronous=false"])
    (last,) = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "validation"]
    assert last["step"] == 2 and cli.main(["train", "--eval", str(out)]) == 0
    assert json.loads((out / "evaluation.json").read_text())["loss"] == last["loss"]


def test_an_evaluation_ends_with_the_weights_it_is_of(config_file, out):
    """It stays where the finished run is only refused, and goes when updates are done."""
    steps = "train.steps={}".format
    assert cli.main(["train", str(config_file), steps(2)]) == cli.main(["train", "--eval", str(out)]) == 0
    assert cli.main(["train", str(config_file), steps(2)]) == 2 and (out / "evaluation.json").exists()
    assert cli.main(["train", str(config_file), steps(3)]) == 0 and not (out / "evaluation.json").exists()


def test_eval_without_weights_or_with_others_says_so(config_file, out, capsys):
    for given, said in (
        (config_file, "nor a whole checkpoint"),
        (config_file.parent / "nowhere", "there is no "),
        (config_file.parent, "holds no config.yaml; name the directory of a run, or its YAML file"),
    ):
        assert cli.main(["train", "--eval", str(given)]) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert cli.main(["train", "--eval", str(config_file), "--stop-after", "1h"]) == 2
    assert "--stop-after: ends training, and --eval trains nothing" in capsys.readouterr().err
    assert cli.main(["train", str(config_file), "train.steps=1", "train.validate_every=null"]) == 0
    assert cli.main(["train", "--eval", str(out), "model.hidden_size=24"]) == 1
    assert "does not fit the model section" in capsys.readouterr().err
    (out / "model.safetensors").unlink()
    assert cli.main(["train", "--eval", str(out), "model.hidden_size=24"]) == 1
    assert "make it describe these weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["eval.distances=[8]"], "eval.distances: has no effect without eval.probes"),
        (["eval.probes=[recall]", "eval.distances=[8, 7]"], "eval.distances[1]: 7 is odd"),
        (["eval.probes=[needle]", "eval.distances=[8]"], "eval.distances[0]: 8 tokens is no distance for needle"),
        (["eval.probes=[needle]", "data.seq_len=20"], "eval.probes: needle needs longer sequences"),
        (["eval.probes=[needle, needle]"], "eval.probes: names a probe twice"),
    ],
)
def test_probes_that_cannot_be_asked_are_refused_before_anything_is_written(overrides, words, config_file, out, capsys):
    assert cli.main(["train", str(config_file), *overrides]) == 2
    assert words in capsys.readouterr().err and not out.exists()


def test_the_usual_distances_fit(config_file):
    for tokens in (13, 24, 64, 100, 16384):
        config, _ = load_config(config_file, [f"data.seq_len={tokens}", "eval.probes=[recall]"])
        distances = probe_distances(config, "recall")
        assert distances and all(d % 2 == 0 and 2 <= d < tokens for d in distances) and list(distances) == sorted(set(distances))
