"""The loss-spike guard: what it calls a spike, and what a run then does."""

import math

import pytest

from longtrain import cli
from longtrain.config.run import SpikeConfig
from longtrain.train import loop, step
from longtrain.train.checkpoint import list_checkpoints, step_of
from longtrain.train.output import read_metrics
from longtrain.train.spike import MOST_IN_A_ROW, SpikeGuard

ON = ("spike.action=skip", "spike.window=3", "spike.threshold=1.5", "train.steps=8", "train.validate_every=null")

pytestmark = pytest.mark.usefixtures("no_picture")


def test_a_spike_is_above_the_median_of_a_full_window_of_one_length():
    guard = SpikeGuard(SpikeConfig(action="skip", window=3, threshold=2.0))
    assert guard.spike(9.0, 64) is None and guard.spike(1.0, 64) is None  # the window is not full
    assert guard.spike(1.5, 64) is None
    assert "3.1, 2.1 times the median" in guard.spike(3.1, 64).replace("3.1000", "3.1")
    assert list(guard.losses) == [9.0, 1.0, 1.5]
    assert guard.spike(3.0, 64) is None and list(guard.losses) == [1.0, 1.5, 3.0]
    assert guard.spike(50.0, 128) is None  # another length: another level
    assert list(guard.losses) == [50.0]


def test_above_a_median_of_zero():
    guard = SpikeGuard(SpikeConfig(action="skip", window=2))
    assert guard.spike(0.0, 64) is None and guard.spike(0.0, 64) is None
    assert guard.spike(0.5, 64) == "loss 0.5000, above a zero median of 2"


def test_what_is_not_finite_is_a_spike_and_ten_in_a_row_are_the_most():
    guard = SpikeGuard(SpikeConfig(action="skip"))
    for _ in range(MOST_IN_A_ROW):
        assert guard.spike(math.nan, 64) and guard.skips()
    again = SpikeGuard(SpikeConfig(action="skip"))
    again.restore(guard.state())
    assert again.spike(math.inf, 64) and not again.skips()
    assert again.spike(1.0, 64) is None and again.in_a_row == 0


def test_without_an_action_nothing_is_a_spike():
    guard = SpikeGuard(SpikeConfig(window=2))
    assert [guard.spike(loss, 64) for loss in (1.0, 1.0, 100.0)] == [None] * 3


@pytest.fixture
def spike_at(monkeypatch):
    """The loss of these updates is reported ten times as high as it is."""

    def arrange(*steps):
        original = step.accumulate

        def higher(model, optimizer, batches, number, *args):
            loss, targets = original(model, optimizer, batches, number, *args)
            return (10 * loss if number in steps else loss), targets

        monkeypatch.setattr(step, "accumulate", higher)

    return arrange


def records(out, kind):
    return [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == kind]


def test_a_skipped_update_changes_no_weight_and_the_run_goes_on(config_file, out, spike_at, monkeypatch, capsys):
    spike_at(5)
    seen = {}
    original = loop.Trainer.update

    def watch(self):
        before = self.setup.optimizer.tensors()
        before = {name: tensor.clone() for name, tensor in before.items()}
        original(self)
        after = self.setup.optimizer.tensors()
        seen[self.done] = all((after[name] == before[name]).all() for name in after)
        assert all(p.grad is None for p in self.setup.model.parameters())

    monkeypatch.setattr(loop.Trainer, "update", watch)
    assert cli.main(["train", str(config_file), *ON]) == 0
    assert [number for number, unchanged in seen.items() if unchanged] == [5]
    assert [r["step"] for r in records(out, "step")] == [1, 2, 3, 4, 6, 7, 8]
    (spike,) = records(out, "spike")
    assert spike["step"] == 5 and spike["skipped"] and "times the median of 3" in spike["found"] and spike["documents"]


def test_the_guard_goes_on_with_the_losses_it_knew(config_file, out, tmp_path, spike_at, crash_after, monkeypatch, capsys):
    spike_at(5)
    assert cli.main(["train", str(config_file), *ON, f"output.dir={tmp_path / 'alone'}"]) == 0
    crash_after(3)
    with pytest.raises(SystemExit):
        cli.main(["train", str(config_file), *ON, "checkpoint.every_steps=1"])
    monkeypatch.undo()
    spike_at(5)
    assert cli.main(["train", str(config_file), *ON]) == 0
    for kind in ("step", "spike"):
        assert [(r["step"], r.get("loss")) for r in records(out, kind)] == [
            (r["step"], r.get("loss")) for r in records(tmp_path / "alone", kind)
        ]


def test_stop_ends_with_the_state_before_the_update_saved(config_file, out, spike_at, capsys):
    spike_at(5)
    assert cli.main(["train", str(config_file), "spike.action=stop", *ON[1:]]) == 1
    error = capsys.readouterr().err
    assert "step 5: spike: loss " in error and "with step 4 saved" in error and error.count("\n") == 1
    assert [step_of(c) for c in list_checkpoints(out / "checkpoints")] == [4]
    assert cli.main(["train", str(config_file), *ON[1:]]) == 0
    assert [r["step"] for r in records(out, "step")] == list(range(1, 9))


def test_a_loss_that_is_not_finite_is_skipped_or_ends_the_run_and_is_not_saved(config_file, out, tmp_path, monkeypatch, capsys):
    original = step.accumulate

    def nan(model, optimizer, batches, number, *args):
        if number == 3:
            raise step.not_finite("loss", math.nan, number, batches)
        return original(model, optimizer, batches, number, *args)

    monkeypatch.setattr(step, "accumulate", nan)
    assert cli.main(["train", str(config_file), *ON]) == 0
    assert "the loss is nan" in records(out, "spike")[0]["found"]
    assert cli.main(["train", str(config_file), "spike.action=stop", *ON[1:], f"output.dir={tmp_path / 'stop'}"]) == 1
    assert "step 3: the loss is nan" in capsys.readouterr().err
    assert not list_checkpoints(tmp_path / "stop" / "checkpoints")
