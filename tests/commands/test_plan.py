"""`longtrain plan`: plans for machines that are not here, and settings that train takes."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace

import pytest
import yaml

from longtrain import cli
from longtrain.commands import plan as command
from longtrain.config import load_config
from longtrain.plan import Plan
from longtrain.planner.explore import combinations, lacks, refusal, smallest
from tests.browser import open_page

SHAPE = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip


@pytest.fixture
def shape(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE))
    return str(path)


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({
        "model": {"vocab_size": 256, "num_layers": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1},
        "data": {"source": "stdlib", "seq_len": 4096}, "train": {"steps": 1, "device": "cpu"}, "output": {"dir": str(tmp_path / "out")},
    }))  # fmt: skip
    return str(path)


def test_a_shape_on_a_machine_that_is_not_here(shape, tmp_path, capsys):
    out = tmp_path / "plan"
    command = [
        "plan",
        shape,
        "--seq-len",
        "262144",
        "--budget",
        "8GiB",
        "--device",
        "h100",
        "--host",
        "8GiB",
        "--disk",
        "64GiB",
        "--out",
        str(out),
    ]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    for part in ("tokens/s", "at the peak", "binding:", "by hand", "Pareto front", "longest sequence in 8.00 GiB", "MFU"):
        assert part in said
    assert int(re.search(r"longest sequence in 8.00 GiB: ([\d,]+)", said)[1].replace(",", "")) >= 262144
    page = (out / "plan.html").read_text()
    assert "Time against memory" in page and "http" not in re.sub(r"http://www\.w3\.org\S*", "", page)
    settings = yaml.safe_load((out / "plan.yaml").read_text())["memory"]
    assert settings["chunk_tokens"] > 0 and settings["segment_layers"] in (1, 2, 4)


@pytest.mark.parametrize("width, scheme", [(500, "dark"), pytest.param(1280, "light", marks=pytest.mark.slow)])
def test_a_browser_draws_the_page_without_a_complaint(width, scheme, shape, tmp_path):
    command = ["plan", shape, "--seq-len", "262144", "--device", "h100", "--gpus", "2", "--host", "8GiB", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    shown, figures = open_page(tmp_path / "plan.html", tmp_path, width=width, scheme=scheme)
    assert figures == {"front"} and "binding:" in shown.lower()


def test_several_devices(shape, tmp_path, capsys):
    assert cli.main(["plan", shape, "--seq-len", "65536", "--device", "h100", "--gpus", "4", "--quick", "--out", str(tmp_path)]) == 0
    axes = yaml.safe_load((tmp_path / "plan.yaml").read_text())["parallel"]
    assert axes["dp_shard"] * axes["cp_ring"] * axes["cp_ulysses"] == 4
    said = capsys.readouterr().out
    assert "devices a sequence x replicas" in said and all(f"{s} x {4 // s}" in said for s in (1, 2, 4))


def test_the_plan_that_is_written_is_taken(run_file, tmp_path, capsys):
    out = tmp_path / "plan"
    disk = f"memory.disk={{path: {tmp_path}, budget: 64MiB}}"
    assert cli.main(["plan", run_file, disk, "--budget", "2GiB", "--out", str(out), "--quick"]) == 0
    settings = yaml.safe_load((out / "plan.yaml").read_text())
    (tmp_path / "planned.yaml").write_text(yaml.safe_dump({**yaml.safe_load(open(run_file)), **settings}))
    config, _ = load_config(tmp_path / "planned.yaml")
    assert isinstance(Plan(**config.memory.plan_settings()), Plan)
    assert cli.main(["plan", str(tmp_path / "planned.yaml")]) == 0
    assert f"chunks of {settings['memory']['chunk_tokens']} tokens" in capsys.readouterr().out


def test_the_host_s_budget_of_a_config_is_beside_the_optimizer(run_file, capsys):
    host = ["memory.optimizer=host", "memory.host_budget=1MiB", "--device", "h100", "--quick"]
    assert cli.main(["plan", run_file, "memory.budget=8GiB", *host]) == 0
    assert "optimizer on the host" in capsys.readouterr().out
    assert cli.main(["plan", run_file, "memory.budget=8GiB", *host, "--host", "100KiB"]) == 1
    assert "the optimizer needs" in capsys.readouterr().out


def test_what_leaves_the_device_may_differ_by_layer(run_file, tmp_path):
    config, _ = load_config(run_file, [
        "memory.chunk_tokens=512", "memory.host_budget=1GiB",
        "memory.offload={inputs: [host, device, {device: 0.5, host: 0.5}, host], kv: host}",
    ])  # fmt: skip
    offload = config.memory.plan_settings()["offload"]
    assert [split.device for split in offload.inputs] == [0.0, 1.0, 0.5, 0.0] and offload.kv.host == 1.0


@pytest.mark.parametrize("options, problem", [
    (["--seq-len", "0"], "--seq-len: must be at least 1"), (["--gpus", "0", "--seq-len", "8"], "--gpus: must be at least 1"),
    ([], "--seq-len is missing"),
    (["--seq-len", "8192", "--budget=-3GiB"], "--budget"),
    (["--seq-len", "8192", "--budget", "200GiB", "--device", "h100"], "more than the"),
    (["--seq-len", "8192", "--device", "h101"], "no machine that is known"),
    (["model.num_layers=2", "--seq-len", "8"], "settings are of a YAML file"),
    (["--seq-len", "8192", "--batch", "0"], "--batch: must be at least 1"),
])  # fmt: skip
def test_requests_that_are_wrong(shape, options, problem, capsys):
    assert cli.main(["plan", shape, *options]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1


def test_a_model_that_is_no_plain_decoder(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "num_experts": 8}))
    assert cli.main(["plan", str(tmp_path), "--seq-len", "8192"]) == 2
    assert "num_experts" in capsys.readouterr().err


def test_what_is_no_model_is_said_with_what_there_is(tmp_path, capsys):
    (tmp_path / "config.json").write_text("[1, 2")
    refused = {"llama3-7b": "llama3-8b, ", str(tmp_path.parent): "holds no config.json", str(tmp_path): "is no config.json of"}
    for given, said in refused.items():
        assert cli.main(["plan", given, "--seq-len", "8192"]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_a_plan_by_hand_that_does_not_fit_is_said_to(run_file, tmp_path, capsys):
    by_hand = ["plan", run_file, "memory.chunk_tokens=4096", "--device", "rtx4090"]
    assert cli.main(by_hand) == 0
    assert cli.main([*by_hand, "data.seq_len=134217728"]) == 1
    assert re.search(r"this plan does not fit: .* are needed in the .*, of 22.57 GiB", capsys.readouterr().out)
    tier = [f"memory.disk={{path: {tmp_path}, budget: 1MiB}}", "memory.offload={inputs: disk}", "data.seq_len=65536"]
    assert cli.main([*by_hand, *tier]) == 1
    assert "memory.disk holds less than it sends there" in capsys.readouterr().out
    devices = ["parallel.cp_ulysses=2", "parallel.dp_shard=2"]
    capsys.readouterr()
    assert cli.main([*by_hand, *devices]) == 0
    said = capsys.readouterr().out
    assert "4 x rtx4090" in said and "2 x 2" in said and "chunks of 4096 tokens" in said
    for option in (["--gpus", "2"], ["--batch", "1", "2"]):
        assert cli.main([*by_hand, *option]) == 2
        assert f"{option[0]} is for plans that are looked for" in capsys.readouterr().err


def test_a_budget_that_is_named_has_room_for_what_is_taken(run_file):
    """Beside the smallest plan, what the process holds already."""
    args = cli.build_parser().parse_args(["plan", run_file, "--budget", "1GiB"])
    wanted = replace(command.read(args)[0], room=1 << 20, taken=1 << 30)
    named = int(re.search(r"set the budget to (\d+)MiB", refusal(wanted))[1]) << 20
    assert lacks(wanted, small := smallest(wanted, *combinations(wanted)[0])) is not None
    assert lacks(replace(wanted, room=named - wanted.taken), small) is None


def test_every_peak_that_is_told_holds_what_is_taken(run_file, tmp_path, capsys):
    args = cli.build_parser().parse_args(["plan", run_file, "memory.chunk_tokens=512", "--out", str(tmp_path / "plan")])
    wanted, title, plan, _ = command.read(args)
    wanted = replace(wanted, taken=5 << 40, room=1 << 30)
    assert command.show(wanted, args, title, plan) == 0
    said = capsys.readouterr().out + (tmp_path / "plan" / "plan.yaml").read_text() + (tmp_path / "plan" / "plan.html").read_text()
    for place in (r"{} +512 +1 ", r"predicted {} a device", r"Fits: {} of 5121\.00 GiB", r"{}  in all, of 5121\.00 GiB"):
        assert re.search(place.format(r"51\d\d\.\d\d GiB"), said), place


def test_a_short_sequence_is_planned_for_one_device(shape, capsys):
    assert cli.main(["plan", shape, "--seq-len", "32", "--device", "h100", "--gpus", "2", "--quick"]) == 0


def test_without_a_budget_this_machine_has_its_own_memory(run_file, capsys):
    assert cli.main(["plan", run_file, "memory.chunk_tokens=512"]) == 0
    said = float(re.search(r"this machine, ([\d.]+) GiB each", capsys.readouterr().out)[1])
    assert 0 < said * 2**30 < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_place_that_cannot_be_written_is_said_first(shape, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["plan", shape, "--seq-len", "8192", "--out", str(tmp_path / "file" / "plan")]) == 1
    assert "cannot be written (Not a directory)" in capsys.readouterr().err
    for option, place in (("--out", tmp_path / "none" / "machine.json"), ("--path", tmp_path / "none")):
        assert cli.main(["calibrate", option, str(place)]) == 2
        assert f"{option}: {tmp_path / 'none'} is no directory that can be written to" in capsys.readouterr().err


def test_what_would_make_it_possible(shape, capsys):
    assert cli.main(["plan", shape, "--seq-len", "4194304", "--budget", "4GiB", "--device", "h100"]) == 1
    said = capsys.readouterr().out
    assert "nothing fits" in said and "set the budget to" in said and "the sequence length to" in said
