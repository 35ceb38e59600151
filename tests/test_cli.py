"""The command line hands over what it was given, and returns what it was told."""

import subprocess
import sys
import types

import pytest

from longtrain import cli


@pytest.mark.parametrize(
    "module, function, arguments, received",
    [
        ("verify", "run", ["verify", "a.yaml", "train.seed=1"], ("a.yaml", ["train.seed=1"])),
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


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["doctor", "x"]])
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


def test_a_reader_that_goes_away_is_no_error():
    command = (
        "import sys; from longtrain import cli; cli.doctor = lambda args: print('line\\n' * 100000) or 0; sys.exit(cli.main(['doctor']))"
    )
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141
    process.stderr.close()
