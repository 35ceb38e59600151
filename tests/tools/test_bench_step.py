"""bench_step: every method is the same step, memory and time are measured in processes, and numbers are gated by agreement."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import bench_step
from step_methods import prepare
from step_process import StepProcess, Task, memory

import longtrain as lt
from longtrain.nn import ModelConfig

CONFIG = ModelConfig(vocab_size=61, num_layers=3, hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2, window=(None, 9))
TINY = ["--layers", "1", "--hidden", "16", "--ffn", "16", "--vocab", "32", "--heads", "2", "--kv-heads", "1", "--chunk", "32"]


def gradients(method, tokens=45):
    model, step = prepare(method, CONFIG, lt.Plan(chunk_tokens=8), device="cpu", dtype=torch.float64)
    loss = step(torch.arange(tokens)[None] * 7 % 61)
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())])


@pytest.mark.parametrize(
    "method", ["checkpoint", "checkpoint+chunked", "selective+chunked", "streamed", "streamed:store_outputs=0.3,segment_layers=2"]
)
def test_every_method_is_the_same_step(method):
    plain = gradients("plain")
    assert ((gradients(method) - plain).norm() / plain.norm()).item() < 1e-12


def test_selective_checkpointing_runs_attention_once_forward():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += "attention" in func.name() and "backward" not in func.name()
            return func(*args, **(kwargs or {}))

    calls = {}
    for method in ("checkpoint+chunked", "selective+chunked"):
        with Count() as count:
            gradients(method)
        calls[method] = count.calls
    assert calls["selective+chunked"] == 3 and calls["checkpoint+chunked"] == 6


@pytest.mark.parametrize(
    "method,match",
    [("fast", "method must be one of"), ("streamed:chunks=3", "no field of Plan"), ("plain:x=1", "only streamed steps take settings")],
)
def test_unknown_methods_and_settings(method, match):
    with pytest.raises(ValueError, match=match):
        prepare(method, CONFIG, lt.Plan(chunk_tokens=8), device="cpu", dtype=torch.float32)


def test_memory_sees_a_tensor_of_known_size():
    """134 MB. Linux counts pages of each processor by themselves, some hundred late at the most."""
    found = memory(lambda: torch.ones(32 << 20).sum(), torch.device("cpu"))
    assert 124e6 <= found["peak"] <= 150e6 and found["base"] > 50e6


def test_table_and_json(capsys, tmp_path):
    out = tmp_path / "b.json"
    assert (
        bench_step.main(
            [*TINY, "--seq-len", "64", "--methods", "checkpoint+chunked", "streamed:store_outputs=0", "--repeats", "1", "--out", str(out)]
        )
        == 0
    )
    rows = json.loads(out.read_text())["rows"]
    assert [r["method"] for r in rows] == ["checkpoint+chunked", "streamed:store_outputs=0"]
    assert all(r["peak"] >= 0 and r["base"] > 50e6 and len(r["times"]) == 1 for r in rows)
    assert "x checkpoint+chunked (mem, time)" in capsys.readouterr().out


def test_no_numbers_where_methods_disagree(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.001), ("c", float("nan"))):
        torch.save({"w": torch.full((3,), value)}, tmp_path / name)
    outcome = {m: {"loss": 2.0, "gradients": str(tmp_path / m)} for m in "abc"}
    assert not bench_step.disagreements({"a": outcome["a"], "same": outcome["a"]}, "float32")
    assert len(bench_step.disagreements(outcome, "float32")) == 2
    assert len(bench_step.disagreements(outcome, "bfloat16")) == 1


def test_a_process_that_dies_is_an_error(tmp_path):
    task = Task.from_arguments(vars(bench_step.arguments([*TINY, "--seq-len", "64"])), 64)
    with (
        StepProcess(task, "streamed:chunks=3", {}, tmp_path / "g") as process,
        pytest.raises(RuntimeError, match="its process ended with status 1"),
    ):
        process.ask("time")
