"""A run that died, or was stopped, goes on where it was: with the same losses, one trajectory in its metrics, and nothing half written."""

import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from longtrain import cli
from longtrain.train import checkpoint as on_disk
from longtrain.train import loop, saving, stop
from longtrain.train.output import read_metrics

TOOLS = Path(__file__).parents[2] / "tools"
SETTINGS = ("checkpoint.every_steps=1", "checkpoint.keep=3", "train.steps=6", "train.validation_tokens=128")

pytestmark = pytest.mark.usefixtures("no_picture")


def train(file, *overrides, flags=()):
    settings = dict(setting.split("=", 1) for setting in (*SETTINGS, *overrides))
    return cli.main(["train", str(file), *(f"{key}={value}" for key, value in settings.items()), *flags])


def trajectory(directory):
    keys = ("kind", "step", "loss", "grad_norm", "lr")
    return [tuple(r.get(k) for k in keys) for r in read_metrics(directory / "metrics.jsonl") if r["kind"] in ("step", "validation")]


def weights(directory):
    return (directory / "model.safetensors").read_bytes()


def die(file, *overrides):
    with pytest.raises(SystemExit):
        train(file, *overrides)


def checkpoints(out):
    return sorted(p.name for p in (out / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.dtype=bfloat16", "model.attention_dropout=0.2", "memory.chunk_tokens=24"),
        ("train.length_schedule=[{from_step: 0, seq_len: 32}, {from_step: 4, seq_len: 64, rope_base: 1e5}]", "train.tokens_per_update=64"),
        ("checkpoint.asynchronous=false", "model.tie_embeddings=true"),
    ],
    ids=["bfloat16 with dropout, streamed", "length schedule", "tied, synchronous"],
)
def test_a_run_that_died_ends_as_one_that_did_not(overrides, config_file, out, tmp_path, crash_after, monkeypatch, capsys):
    assert train(config_file, f"output.dir={tmp_path / 'alone'}", *overrides) == 0
    crash_after(3)
    die(config_file, *overrides)
    monkeypatch.undo()
    capsys.readouterr()
    assert train(config_file, *overrides) == 0
    assert re.search("going on from step [23]", capsys.readouterr().out)
    assert trajectory(out) == trajectory(tmp_path / "alone")
    assert weights(out) == weights(tmp_path / "alone")


def test_metrics_after_the_checkpoint_are_dropped_and_the_record_says_which(config_file, out, crash_after, monkeypatch, capsys):
    crash_after(5)
    die(config_file, "checkpoint.every_steps=2")
    monkeypatch.undo()
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "step", "st')  # the line that the process was writing when it died
    assert train(config_file, "checkpoint.every_steps=2") == 0
    (resumed,) = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "resume"]
    assert resumed["step"] == 4 and resumed["dropped_steps"] == [5, 5] and resumed["dropped"] == 1
    assert [step for kind, step, *_ in trajectory(out) if kind == "step"] == [1, 2, 3, 4, 5, 6]
    assert "updates 5 to 5 are done again" in capsys.readouterr().out


def damage(checkpoint, how):
    file = next(checkpoint.glob("__*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if how == "bit" else content[:-100])


@pytest.mark.parametrize("how, said", [("bit", "bytes have changed"), ("truncated", " bytes of ")])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_used(
    how, said, config_file, out, alone, crash_after, monkeypatch, capsys
):
    crash_after(4, "note_saved")
    die(config_file, "checkpoint.asynchronous=false")
    monkeypatch.undo()
    newest = on_disk.list_checkpoints(out / "checkpoints")[-1]
    damage(newest, how)
    capsys.readouterr()
    assert train(config_file) == 0
    printed = capsys.readouterr().out
    assert f"{newest} is damaged: " in printed and said in printed and f"set aside as damaged-{newest.name}" in printed
    assert f"going on from step {on_disk.step_of(newest) - 1}" in printed
    assert trajectory(out) == trajectory(alone) and weights(out) == weights(alone)


def test_with_every_checkpoint_damaged_nothing_is_begun_anew(config_file, out, crash_after, monkeypatch, capsys):
    crash_after(3)
    die(config_file)
    monkeypatch.undo()
    for checkpoint in on_disk.list_checkpoints(out / "checkpoints"):
        damage(checkpoint, "bit")
    before = checkpoints(out)
    capsys.readouterr()
    assert train(config_file) == 1
    error = capsys.readouterr().err
    assert (
        error.count("is damaged") == len([n for n in before if n.startswith("step-")])
        and "checkpoint.resume=never" in error
        and error.count("\n") == 1
    )
    assert checkpoints(out) == before


def test_half_written_checkpoints_are_removed_and_the_latest_kept(config_file, out, crash_after, monkeypatch, capsys):
    crash_after(3)
    die(config_file)
    monkeypatch.undo()
    half = out / "checkpoints" / ".step-00000009.partial"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    capsys.readouterr()
    assert train(config_file) == 0
    assert "removed half-written .step-00000009.partial" in capsys.readouterr().out
    assert checkpoints(out) == ["step-00000004", "step-00000005", "step-00000006"]


def test_the_plan_may_change_between_two_starts(config_file, out, tmp_path, crash_after, monkeypatch, capsys):
    eps = "train.eps=1e-3"  # with 1e-8, rounding in a gradient of nothing else moves a weight by lr
    assert train(config_file, f"output.dir={tmp_path / 'alone'}", "memory.chunk_tokens=24", eps) == 0
    crash_after(3)
    die(config_file, "memory.chunk_tokens=24", eps)
    monkeypatch.undo()
    assert train(config_file, "memory.chunk_tokens=16", "memory.segment_layers=2", eps) == 0
    assert "changed since then: memory.chunk_tokens: 24 -> 16" in capsys.readouterr().out
    for ours, alone in zip(trajectory(out), trajectory(tmp_path / "alone"), strict=True):
        assert ours[:2] == alone[:2] and ours[2] == pytest.approx(alone[2], rel=1e-4)


def test_a_run_goes_on_when_its_texts_have_moved(config_file, texts, out, alone, tmp_path, crash_after, monkeypatch, capsys):
    crash_after(3)
    die(config_file)
    monkeypatch.undo()
    shutil.copytree(texts, tmp_path / "moved" / "here")
    capsys.readouterr()
    assert train(config_file, f"data.files=[{tmp_path / 'moved'}]") == 0
    assert "changed since then: data.files" in capsys.readouterr().out
    assert trajectory(out) == trajectory(alone) and weights(out) == weights(alone)


@pytest.mark.parametrize(
    "overrides, setting, said",
    [
        (("model.hidden_size=32",), "model", "another model"),
        (("data.seed=1",), "data", "other data"),
        (("train.steps=2",), "train.steps", "beyond 2"),
    ],
)
def test_what_cannot_go_on_is_refused_and_nothing_is_lost(overrides, setting, said, config_file, out, crash_after, monkeypatch, capsys):
    crash_after(4)
    die(config_file)
    monkeypatch.undo()
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and "partial" not in str(p)}
    capsys.readouterr()
    assert train(config_file, *overrides) == 2
    error = capsys.readouterr().err
    assert f": {setting}: " in error and said in error and error.count("\n") == 1
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_finished_run_goes_on_with_more_steps_and_another_begins_from_its_checkpoint(config_file, out, tmp_path, capsys):
    assert train(config_file, "train.schedule=constant") == 0
    assert train(config_file, f"output.dir={tmp_path / 'alone'}", "train.schedule=constant", "train.steps=8") == 0
    assert (
        train(config_file, f"output.dir={tmp_path / 'other'}", "train.schedule=constant", "train.steps=8", f"checkpoint.resume={out}") == 0
    )
    assert train(config_file, "train.schedule=constant", "train.steps=8") == 0
    steps = [t for t in trajectory(tmp_path / "alone") if t[0] == "step"]
    assert [t for t in trajectory(out) if t[0] == "step"] == steps
    assert [t for t in trajectory(tmp_path / "other") if t[0] == "step"] == steps[6:]
    assert weights(out) == weights(tmp_path / "alone") == weights(tmp_path / "other")


def test_a_run_that_began_elsewhere_goes_on_by_the_command_that_it_names(config_file, out, tmp_path, monkeypatch, capsys):
    """`checkpoint.resume` with a path, or never, would not go on with what was saved since."""
    update = loop.Trainer.update

    def signalled(self):
        update(self)
        if self.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(config_file, f"output.dir={tmp_path / 'first'}", "train.steps=2") == 0
    for begun in (f"checkpoint.resume={tmp_path / 'first'}", "checkpoint.resume=never"):
        shutil.rmtree(out, ignore_errors=True)
        with monkeypatch.context() as inner:
            inner.setattr(loop.Trainer, "update", signalled)
            assert train(config_file, begun) == 128 + signal.SIGTERM
        assert "; the same command with checkpoint.resume=auto goes on from there" in capsys.readouterr().out
        assert train(config_file, begun) == 2
        assert "already holds a run; set checkpoint.resume=auto to go on with it" in capsys.readouterr().err
        assert train(config_file) == 0


def test_a_damaged_line_of_the_metrics_is_named(config_file, out, crash_after, monkeypatch, capsys):
    crash_after(3)
    die(config_file)
    monkeypatch.undo()
    lines = (out / "metrics.jsonl").read_bytes().split(b"\n")
    (out / "metrics.jsonl").write_bytes(b"\n".join([lines[0], b"\0" * 9, *lines[2:]]))
    capsys.readouterr()
    assert train(config_file) == 1
    error = capsys.readouterr().err
    assert "metrics.jsonl:2 is no record of a run" in error and error.count("\n") == 1


def test_resume_names_what_is_not_a_checkpoint(config_file, out, tmp_path, capsys):
    for path, said in ((tmp_path / "nowhere", "there is no "), (tmp_path, "is damaged: ")):
        assert train(config_file, f"checkpoint.resume={path}") == 2
        error = capsys.readouterr().err
        assert "checkpoint.resume: " in error and said in error and error.count("\n") == 1


@pytest.mark.parametrize("number, when", [(signal.SIGINT, "between updates"), (signal.SIGTERM, "inside an update")])
def test_a_signal_saves_and_ends_and_the_run_goes_on_bit_for_bit(number, when, config_file, out, tmp_path, monkeypatch, capsys):
    extra = ("memory.chunk_tokens=24", "model.attention_dropout=0.2", "checkpoint.every_steps=null")
    assert train(config_file, f"output.dir={tmp_path / 'alone'}", *extra) == 0
    name = "update" if when == "between updates" else "span_done"
    original, sent = getattr(loop.Trainer, name), []

    def signalled(self, *args):
        original(self, *args)
        if self.done == 3 and not sent:
            sent.append(os.kill(os.getpid(), number))

    monkeypatch.setattr(loop.Trainer, name, signalled)
    before = signal.getsignal(number)
    assert train(config_file, *extra) == 128 + number
    assert signal.getsignal(number) == before
    assert checkpoints(out) == ["step-00000003"]
    assert "after step 3/6, saved; the same command goes on" in capsys.readouterr().out
    assert read_metrics(out / "metrics.jsonl")[-1] == {"kind": "stopped", "step": 3, "reason": signal.Signals(number).name}
    assert train(config_file, *extra) == 0
    assert trajectory(out) == trajectory(tmp_path / "alone") and weights(out) == weights(tmp_path / "alone")


def test_a_second_signal_ends_at_once():
    program = f"""
import os, runpy, signal
stop = runpy.run_path({stop.__file__!r})
with stop["Stop"](None) as asked:
    os.kill(os.getpid(), signal.SIGTERM)
    try:
        asked.check()
    except stop["Stopped"]:
        print("stopped", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and "once more ends at once" in done.stderr and done.stdout == "stopped\n"


def test_the_time_limit_leaves_room_for_the_next_update_and_no_clock_change_matters(config_file, out, monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.time", lambda: 1e9 - now[0])  # a clock that runs backwards
    original = loop.gradients

    def ten_seconds(*args, **share):
        now[0] += 10
        return original(*args, **share)

    monkeypatch.setattr(loop, "gradients", ten_seconds)
    assert train(config_file, "checkpoint.every_steps=null", flags=("--stop-after", "45s")) == 75
    assert checkpoints(out) == ["step-00000004"]  # a fifth update would have ended at 50 s
    assert "stopped (time limit) after step 4/6" in capsys.readouterr().out
    now[0] += 1e6
    assert train(config_file, "checkpoint.every_steps=null", "checkpoint.every_minutes=0.3", flags=("--stop-after", "45s")) == 0
    assert read_metrics(out / "metrics.jsonl")[-1]["seconds"] == pytest.approx(60)


def test_minutes_between_checkpoints(config_file, out, monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    original = loop.gradients
    monkeypatch.setattr(loop, "gradients", lambda *args, **share: (now.__setitem__(0, now[0] + 60), original(*args, **share))[1])
    assert train(config_file, "checkpoint.every_steps=null", "checkpoint.every_minutes=2", "checkpoint.asynchronous=false") == 0
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "checkpoint"] == [2, 4, 6]


def test_two_runs_cannot_write_one_directory(config_file, out, capsys):
    out.mkdir()
    with open(out / "lock", "a+") as held:
        held.write("process 123 on elsewhere\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        assert train(config_file) == 1
        error = capsys.readouterr().err
        assert f"{out} is being written by process 123 on elsewhere; end that run first" in error and error.count("\n") == 1
    assert sorted(p.name for p in out.iterdir()) == ["lock"]
    assert train(config_file) == 0


def test_a_checkpoint_being_written_does_not_see_the_updates_after_it(config_file, out, tmp_path, monkeypatch, capsys):
    """The writer waits until two more updates have changed the weights in place; what it then writes is still the state it was given."""
    assert train(config_file, f"output.dir={tmp_path / 'alone'}", "train.steps=2", "train.schedule=constant") == 0
    original, go_on = saving.write_checkpoint, threading.Event()

    def late(checkpoint, *args):
        if on_disk.step_of(checkpoint) == 2:
            assert go_on.wait(60)
        return original(checkpoint, *args)

    def release(self):
        loop_update(self)
        if self.done == 4:
            go_on.set()

    loop_update = loop.Trainer.update
    monkeypatch.setattr(saving, "write_checkpoint", late)
    monkeypatch.setattr(loop.Trainer, "update", release)
    assert train(config_file, "train.schedule=constant", "checkpoint.every_steps=2") == 0
    read = []
    for directory in (out, tmp_path / "alone"):
        checkpoint = on_disk.path_of(directory / "checkpoints", 2)
        tensors = {name: torch.empty(shape) for name, shape in on_disk.read_facts(checkpoint)["tensors"].items() if "random" not in name}
        with on_disk.one_process():
            on_disk.read_tensors(checkpoint, tensors)
        read.append(tensors)
    assert read[0].keys() == read[1].keys() and all(torch.equal(read[0][name], read[1][name]) for name in read[0])


def test_without_room_for_the_checkpoints_the_run_does_not_begin(config_file, out, monkeypatch, capsys):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=5_000_000))
    assert train(config_file, "model.hidden_size=128") == 1
    error = capsys.readouterr().err
    assert "4 more checkpoints of 2 MiB need " in error and "lower checkpoint.keep" in error and error.count("\n") == 1
    assert not (out / "metrics.jsonl").exists()


def test_a_disk_that_fills_up_in_a_checkpoint_ends_the_run_and_the_one_before_it_stands(config_file, out, alone, monkeypatch, capsys):
    """By the system's limit on file sizes, in this process: what the writer meets is the real error."""
    original = loop.Trainer.save
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(self):
        self.note_saved(self.saver.finish())
        if self.done == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
        original(self)

    monkeypatch.setattr(loop.Trainer, "save", filling)
    try:
        assert train(config_file) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert "step-00000003 cannot be written (File too large); make room" in error and error.count("\n") == 1
    assert "step-00000003" not in checkpoints(out) and "step-00000002" in checkpoints(out)
    monkeypatch.undo()
    assert train(config_file) == 0
    assert trajectory(out) == trajectory(alone)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MiB, where the system lets us make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("checked", [True, False], ids=["seen before", "met by the writer"])
def test_a_full_disk_ends_the_run_and_with_room_it_goes_on(checked, config_file, tiny_disk, tmp_path, crash_after, monkeypatch, capsys):
    monkeypatch.setattr(saving, "ROOM_BYTES", 20_000)
    settings = (f"output.dir={tiny_disk / 'out'}", "checkpoint.keep=1", "checkpoint.asynchronous=false", "model.num_layers=1")
    assert train(config_file, f"output.dir={tmp_path / 'alone'}", *settings[1:]) == 0
    update, filler = loop.Trainer.update, tiny_disk / "filler"

    def filling(self):
        update(self)
        if self.done == 3:
            filler.write_bytes(bytes(shutil.disk_usage(tiny_disk).free - 50_000))

    monkeypatch.setattr(loop.Trainer, "update", filling)
    if not checked:
        monkeypatch.setattr(saving, "check_room", lambda *_: None)
    assert train(config_file, *settings) == 1
    error = capsys.readouterr().err
    assert (" are free" if checked else "step-00000003 cannot be written (No space left on device)") in error and error.count(
        "\n"
    ) == 1
    assert "step-00000002" in checkpoints(tiny_disk / "out") and "step-00000003" not in checkpoints(tiny_disk / "out")
    monkeypatch.undo()
    monkeypatch.setattr(saving, "ROOM_BYTES", 20_000)
    filler.unlink()
    assert train(config_file, *settings) == 0
    assert "going on from step 2" in capsys.readouterr().out
    assert trajectory(tiny_disk / "out") == trajectory(tmp_path / "alone")


def test_a_run_goes_back_to_a_checkpoint_of_its_own_only_when_asked(config_file, out, tmp_path, capsys):
    assert train(config_file) == 0
    before, back = trajectory(out), f"checkpoint.resume={out / 'checkpoints' / 'step-00000004'}"
    capsys.readouterr()
    assert train(config_file, back) == 2
    assert "would lose what came after" in capsys.readouterr().err and len(checkpoints(out)) == 3
    assert train(config_file, back, "output.overwrite=true", "train.lr=1e-3") == 0
    printed = capsys.readouterr().out
    assert "removed step-00000006, which came after" in printed and "changed since then: train.lr: 0.01 -> 0.001" in printed
    assert [a == b for a, b in zip(trajectory(out), before, strict=True)] == [t[1] <= 4 for t in before]


def test_one_of_several_processes_must_know_its_number(config_file, out, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert train(config_file) == 1
    assert "WORLD_SIZE is 2 and RANK is not set; start 2 processes with torchrun" in capsys.readouterr().err and not out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_is_said_before_training(config_file, out, capsys):
    out.mkdir()
    (out / "lock").touch()
    out.chmod(0o500)
    assert train(config_file) == 1
    assert "cannot be written (" in capsys.readouterr().err


def test_a_read_only_metrics_file_is_said_before_training(config_file, tmp_path, capsys):
    """Root too cannot write into /proc/self, which is as read-only as a file system can be."""
    assert train(config_file, "output.dir=/proc/self/longtrain") == 1
    error = capsys.readouterr().err
    assert "/proc/self/longtrain cannot be written (" in error and error.count("\n") == 1


def test_three_kills_and_a_comparison(tmp_path):
    """kill -9, as `tools/kill_resume.py` does it thirty times."""
    command = [sys.executable, str(TOOLS / "kill_resume.py"), "--kills", "3", "--steps", "16", "--inside", "1", "--dtype", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal bit for bit" in done.stdout


@pytest.mark.slow
def test_thirty_kills_and_a_comparison():
    done = subprocess.run([sys.executable, str(TOOLS / "kill_resume.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 kills, " in done.stdout and "equal bit for bit" in done.stdout
