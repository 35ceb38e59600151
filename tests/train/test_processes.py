"""The driver on several gloo processes: the same YAML gives the same losses, one that dies ends all, and the run goes on with fewer."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longtrain import cli
from longtrain.train import checkpoint, loop
from longtrain.train import step as one_step
from longtrain.train.output import read_metrics
from tests.train.ranks import Ranks, assert_same_run, losses

SETTINGS = (
    "memory.chunk_tokens=24",
    "parallel.cp_ulysses=null",
    "train.steps=6",
    "checkpoint.every_steps=1",
    "checkpoint.keep=3",
    "train.threads=1",
    "train.validation_tokens=256",
    "train.tokens_per_update=128",
    "train.eps=1e-3",
)
"""AdamW's smallest divisor is eps: rounding of 1e-8 in a gradient of nothing else moves a weight by lr x 1e-8 / 1e-3, a tenth of what
`assert_same_run` allows; with the usual 1e-8 it would move it by lr."""
DEAD = re.compile(
    r"(.*step \d+|ending): rank (\d) \(process \d+ on \S+, last in .*\) gives no sign of life: dead or stuck; rank \d was at (.+); all"
)
LIMIT = 90.0
"""Seconds in which everybody ends after one has died: 21 at most by the clocks of `train/watch.py`, the rest is for a slow machine."""

pytestmark = pytest.mark.usefixtures("no_picture")


def test_two_processes_train_as_one(tmp_path, config_file, out, alone):
    """Two that share every sequence and all weights; the second says nothing and writes nothing but its part of checkpoints."""
    ranks = Ranks(2, tmp_path, config_file, *SETTINGS)
    assert ranks.wait() == [0, 0], ranks.said(0) + ranks.said(1)
    assert_same_run(out, alone)
    assert "2 ranks: heads over 2" in ranks.said() and ranks.said(1) == ""
    assert {p.name for p in (out / "checkpoints").iterdir()} == {f"step-{n:08}" for n in (4, 5, 6)}
    assert len(list((out / "checkpoints" / "step-00000006").glob("*.distcp"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, settings",
    [
        (2, ("parallel.cp_ulysses=1", "parallel.cp_ring=2", "parallel.layout=zigzag")),
        (2, ("parallel.cp_ulysses=1", "parallel.dp_shard=2")),
        (2, ("parallel.cp_ulysses=1", "parallel.dp_replicate=2", "model.tie_embeddings=true")),
        (2, ("model.attention_dropout=0.3", "data.isolate=false", "data.packing=concatenate", "memory.segment_layers=2")),
        (4, ("parallel.cp_ring=2", "eval.probes=[recall]", "eval.examples=4")),
        (4, ("parallel.dp_replicate=2",)),
        (4, ("parallel.cp_ulysses=1", "parallel.dp_replicate=2", "parallel.dp_shard=null")),
        (3, ("parallel.cp_ulysses=1", "parallel.cp_ring=3")),
    ],
    ids=lambda value: " ".join(value).replace("parallel.", "") if isinstance(value, tuple) else str(value),
)
def test_every_mesh_trains_as_one_process(size, settings, tmp_path, config_file, out):
    settings = (*SETTINGS, "train.tokens_per_update=256", "train.steps=4", *settings)
    settings = tuple(f"{key}={value}" for key, value in dict(s.split("=", 1) for s in settings).items())
    assert cli.main(["train", str(config_file), *settings, f"output.dir={tmp_path / 'alone'}"]) == 0
    ranks = Ranks(size, tmp_path, config_file, *settings)
    assert ranks.wait() == [0] * size, ranks.said()
    assert_same_run(out, tmp_path / "alone")
    probes = [[r.get("probes") for r in read_metrics(d / "metrics.jsonl") if r["kind"] == "validation"] for d in (out, tmp_path / "alone")]
    assert probes[0] == probes[1]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [("parallel.cp_ulysses=2",), ("parallel.cp_ulysses=1", "parallel.dp_shard=2")], ids=" ".join)
def test_two_processes_plan_for_the_share_of_each(settings, tmp_path, config_file, out, alone):
    ranks = Ranks(2, tmp_path, config_file, *SETTINGS, "memory.chunk_tokens=null", "memory.budget=4GiB", *settings)
    assert ranks.wait() == [0, 0], ranks.said()
    assert_same_run(out, alone)
    assert re.search(r"memory  chunks of \d+ tokens, .* predicted peak \d+ MiB", ranks.said())


def test_two_processes_evaluate_what_one_has_trained(tmp_path, config_file, out, alone):
    ranks = Ranks(2, tmp_path, config_file, *SETTINGS, f"output.dir={alone}", "eval.probes=[recall]", "eval.examples=4", flags=("--eval",))
    assert ranks.wait() == [0, 0], ranks.said()
    assert ranks.said(1) == "" and f"written to {alone / 'evaluation.json'}" in ranks.said()
    found = json.loads((alone / "evaluation.json").read_text())
    assert cli.main(["train", "--eval", str(alone), "eval.probes=[recall]", "eval.examples=4"]) == 0
    expected = json.loads((alone / "evaluation.json").read_text())
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6) and found["probes"] == expected["probes"]
    assert [p["loss"] for p in found["positions"]] == pytest.approx([p["loss"] for p in expected["positions"]], rel=1e-6)
    assert found["targets"] == expected["targets"] == 252


@pytest.mark.slow
def test_bfloat16_on_two_processes_is_as_near_as_rounding(tmp_path, config_file, out):
    settings = (*SETTINGS, "train.dtype=bfloat16")
    assert cli.main(["train", str(config_file), *settings, f"output.dir={tmp_path / 'alone'}"]) == 0
    ranks = Ranks(2, tmp_path, config_file, *settings)
    assert ranks.wait() == [0, 0], ranks.said()
    assert losses(out)["loss"] == pytest.approx(losses(tmp_path / "alone")["loss"], rel=2**-8)
    assert (tmp_path / "alone" / "model.safetensors").stat().st_size == (out / "model.safetensors").stat().st_size


def never_end(rank: int) -> None:
    """In a process that will be killed: the last checkpoint is never finished, however late the kill."""
    flush = checkpoint._flush_directory

    def held(directory):
        flush(directory)
        while directory.name == ".step-00000006.partial":
            time.sleep(1)

    checkpoint._flush_directory = held


def kill_and_go_on(tmp_path, config_file, out, alone, chance: random.Random, size: int, then: int) -> None:
    """Kill a random rank at a random moment after a random step; the others end and say who it was; the run ends on `then` processes."""
    ranks = Ranks(size, tmp_path, config_file, *SETTINGS, before="tests.train.test_processes:never_end")
    victim, after = chance.randrange(size), chance.randrange(1, 5)
    ranks.wait_for(f"checkpoint of step {after} stands")
    time.sleep(chance.uniform(0, 0.1))
    ranks.signal(victim, signal.SIGKILL)
    others = [r for r in range(size) if r != victim]
    assert ranks.wait(others, LIMIT) == [1] * len(others), ranks.said() + ranks.said(1)
    said = "".join(ranks.said(r) for r in range(size))
    errors = DEAD.findall(said)
    assert [int(who) for _, who, _ in errors] == [victim], said
    if then == 1:
        assert cli.main(["train", str(config_file), *SETTINGS]) == 0
    else:
        again = Ranks(then, tmp_path, config_file, *SETTINGS)
        assert again.wait() == [0] * then, again.said()
    assert_same_run(out, alone)
    assert any(r["kind"] == "resume" for r in read_metrics(out / "metrics.jsonl"))


def test_a_killed_rank_ends_all_and_one_process_goes_on(tmp_path, config_file, out, alone):
    kill_and_go_on(tmp_path, config_file, out, alone, random.Random(0), size=2, then=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_any_rank_killed_at_any_moment(seed, tmp_path, config_file, out, alone):
    kill_and_go_on(tmp_path, config_file, out, alone, random.Random(seed), size=2, then=2)


@pytest.mark.slow
def test_a_stopped_rank_ends_the_others(tmp_path, config_file):
    """It lives, and does nothing."""
    ranks = Ranks(2, tmp_path, config_file, *SETTINGS, "train.steps=4000")
    ranks.wait_for("step +2/")
    ranks.signal(0, signal.SIGSTOP)
    assert ranks.wait([1], LIMIT) == [1]
    assert "rank 0 (process" in ranks.said(1) and "gives no sign of life: dead or stuck; rank 1 was at" in ranks.said(1)


def hang(rank: int) -> None:
    """In a process of the test below: rank 1 stays in step 3, its threads live."""
    original = one_step.accumulate

    def accumulate(model, optimizer, batches, step, *args):
        while rank == 1 and step == 3:
            time.sleep(1)
        return original(model, optimizer, batches, step, *args)

    one_step.accumulate = accumulate


def hang_in_validation(rank: int) -> None:
    original = loop.evaluate

    def evaluate(*args):
        while rank == 1:
            time.sleep(1)
        return original(*args)

    loop.evaluate = evaluate


@pytest.mark.slow
@pytest.mark.parametrize(
    "before, said",
    [
        ("hang", "step 3: .*; rank 1 is at no collective, accumulate"),
        ("hang_in_validation", "the validation after step 2: .*; rank 1 is at no collective, evaluate"),
    ],
)
def test_a_rank_that_gets_nowhere_ends_all_after_the_stated_time(before, said, tmp_path, config_file):
    ranks = Ranks(2, tmp_path, config_file, *SETTINGS, "parallel.step_timeout=15s", before=f"tests.train.test_processes:{before}")
    assert ranks.wait() == [1, 1]
    assert re.search(said + r" \(test_processes.py:\d+\)", ranks.said())
    assert "a rank is stuck: nothing moved for 15 s: rank 0 is at all_" in ranks.said() and ranks.said(1) == ""


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_saves_and_ends_all(number, code, tmp_path, config_file, out):
    ranks = Ranks(2, tmp_path, config_file, *SETTINGS, "train.steps=4000", "checkpoint.every_steps=null", "train.validate_every=null")
    ranks.wait_for("step +2/")
    ranks.signal(1, number)
    assert ranks.wait() == [code, code], ranks.said()
    (checkpoint,) = (out / "checkpoints").iterdir()
    done = int(checkpoint.name.removeprefix("step-"))
    assert f"after step {done}/4000, saved" in ranks.said()
    assert "rank 1: " in ranks.said(1) and f"stopped ({signal.Signals(number).name})" not in ranks.said(1)


@pytest.mark.parametrize(
    "overrides, own, says, code",
    [
        (
            ("parallel.cp_ulysses=1", "parallel.cp_ring=3"),
            {},
            r"run.yaml:\d+|command line: parallel: .* cp_ring 3 x .* make 3 processes, and 2 were started",
            2,
        ),
        (
            (),
            {1: ("train.lr=1e-3", "train.seed=7")},
            r"not given the same: train.lr is 0.001 on rank 1 and 0.01 on rank 0; train.seed is 7 on rank 1",
            1,
        ),
        pytest.param((), {1: ("data.files=[OTHER]",)}, r"data.files\[0\]|data.files is", 1, marks=pytest.mark.slow),
        pytest.param(
            ("memory.chunk_tokens=1",), {}, r"memory.chunk_tokens: 1 tokens cannot be spread over 2 processes", 2, marks=pytest.mark.slow
        ),
        pytest.param(
            ("parallel.cp_ulysses=1", "parallel.dp_shard=2", "train.tokens_per_update=64"),
            {},
            r"1 sequences of 64 tokens an update cannot be shared by 2",
            2,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("memory.chunk_tokens=null", "memory.budget=120MiB"),
            {},
            r"memory.budget: each of 2 processes: no plan for 1 x 32 tokens fits 120 MiB",
            2,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("parallel.cp_ulysses=1", "parallel.cp_ring=2", "parallel.way=ring", "memory.segment_layers=2"),
            {},
            r"parallel.way: is ring, and that cannot be: it needs two passes",
            2,
            marks=pytest.mark.slow,
        ),
        pytest.param(("memory.optimizer=host",), {}, r"memory.optimizer: host is for one process", 2, marks=pytest.mark.slow),
        pytest.param(("train.init=missing",), {}, r"train.init: missing is no safetensors file", 2, marks=pytest.mark.slow),
    ],
)
def test_what_is_wrong_is_said_once_and_ends_all(overrides, own, says, code, tmp_path, config_file):
    ranks = Ranks(2, tmp_path, config_file, *SETTINGS, *overrides, own=own)
    assert ranks.wait() == [code, code], ranks.said()
    (line,) = [line for line in ranks.said().splitlines() if line]
    assert re.search(says, line), line
    assert ranks.said(1) == ""


@pytest.mark.slow
def test_different_data_under_the_same_name_is_found(tmp_path, config_file, texts, monkeypatch):
    ranks = Ranks(2, tmp_path, config_file, *SETTINGS, before="tests.train.test_processes:other_data")
    assert ranks.wait() == [1, 1]
    assert "not given the same: data is" in ranks.said() and ranks.said(1) == ""


def other_data(rank: int) -> None:
    from longtrain.data import sources
    from longtrain.train import loader

    original = sources.read_text
    loader.read_text = lambda files: original(files)[rank:]


@pytest.mark.slow
def test_one_run_writes_a_directory_at_a_time(tmp_path, config_file, out):
    ranks = Ranks(2, tmp_path, config_file, *SETTINGS, "train.steps=4000")
    ranks.wait_for("step +1/")
    second = Ranks(2, tmp_path, config_file, *SETTINGS, "train.steps=4000")
    codes = second.wait()
    ranks.kill()
    assert codes == [1, 1]
    assert "is being written by process" in second.said() and second.said(1) == ""


@pytest.mark.slow
def test_torchrun_starts_it_and_starts_it_again_when_a_rank_has_died(tmp_path, config_file, out, alone):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "longtrain", "train"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "torchrun.log"
    with open(log, "w") as file:
        torchrun = subprocess.Popen([sys.executable, *command, str(config_file), *SETTINGS], stdout=file, stderr=file, env=environment)
        try:
            while "checkpoint of step 1 stands" not in log.read_text():
                assert torchrun.poll() is None, log.read_text()
                time.sleep(0.01)
            os.kill(int((out / "lock").read_text().split()[1]), signal.SIGKILL)
            assert torchrun.wait(240) == 0, log.read_text()
        finally:
            torchrun.kill()
    assert_same_run(out, alone)
    assert any(r["kind"] == "resume" for r in read_metrics(out / "metrics.jsonl"))
