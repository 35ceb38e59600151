"""The command line hands over what it was given, and returns what it was told."""

import subprocess
import sys
import types

import pytest
import torch

from longtrain import cli


@pytest.mark.parametrize(
    "module, function, arguments, received",
    [
        ("commands.verify", "run", ["verify", "a.yaml", "train.seed=1"], ("a.yaml", ["train.seed=1"])),
        ("planner.calibrate", "run", ["calibrate", "--path", "/scratch"], ("machine.json", "/scratch", None)),
        ("doctor", "run", ["doctor"], ()),
    ],
)
def test_commands_hand_over_and_return_the_exit_code(module, function, arguments, received, monkeypatch):
    calls = []
    stand_in = types.ModuleType(f"longtrain.{module}")
    setattr(stand_in, function, lambda *args: calls.append(args) or 7)
    monkeypatch.setitem(sys.modules, f"longtrain.{module}", stand_in)
    monkeypatch.setattr(f"longtrain.{module}", stand_in, raising=False)
    assert cli.main(arguments) == 7
    assert calls == [received]


def test_settings_may_stand_before_and_behind_options(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "train", lambda args: seen.append((args.config, args.overrides, args.stop_after)) or 0)
    assert cli.main(["train", "a.yaml", "train.lr=1", "--stop-after", "1h", "train.steps=2", "train.seed=3"]) == 0
    assert seen == [("a.yaml", ["train.lr=1", "train.steps=2", "train.seed=3"], 3600.0)]


@pytest.mark.parametrize("arguments",
                         [[], ["trian"], ["train"], ["doctor", "x"], ["train", "a.yaml", "--stop-afer", "1h", "train.steps=2"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2 and "usage: longtrain" in capsys.readouterr().err


def test_interruption_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", interrupted)
    assert cli.main(["train", "a.yaml"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), MemoryError()])
def test_too_little_memory_is_one_line_that_says_what_to_ask(error, monkeypatch, capsys):
    def greedy(args):
        raise error

    monkeypatch.setattr(cli, "train", greedy)
    assert cli.main(["train", "a.yaml"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("longtrain: out of memory (") and "longtrain profile" in said and said.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error():
    command = (
        "import sys; from longtrain import cli; cli.doctor = lambda args: print('line\\n' * 100000) or 0; sys.exit(cli.main(['doctor']))"
    )
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141
    process.stderr.close()
