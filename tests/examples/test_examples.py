"""The examples run, stream, and learn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def run(name: str, *launcher: str, arguments: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        [sys.executable, *launcher, ROOT / "examples" / name, *arguments], capture_output=True, text=True, timeout=1200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def numbers(output: str, name: str) -> list[float]:
    return [float(x) for x in re.findall(rf"{name}\W+([0-9.]+)", output)]


@pytest.mark.parametrize(
    "name, libraries",
    [
        ("hf_trainer.py", ["transformers", "accelerate"]),
        ("trl_sft_lora.py", ["trl", "peft"]),
        ("accelerate_loop.py", ["transformers", "accelerate"]),
    ],
)
def test_a_trainer_learns(name, libraries):
    for library in libraries:
        pytest.importorskip(library)
    output = run(name)
    assert "streamed loss" in output and "left as it is" not in output
    losses = numbers(output, "'loss'")
    assert len(losses) == 5 and losses[-1] < losses[0]


@pytest.mark.parametrize("arguments", [(), ("ddp",)], ids=["fsdp", "ddp"])
def test_two_processes_learn(arguments):
    pytest.importorskip("transformers")
    losses = numbers(run("fsdp.py", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", arguments=arguments), "'loss'")
    assert len(losses) == 5 and losses[-1] < losses[0]


def test_preferences_and_rewards_are_trained_on():
    for library in ("trl", "peft"):
        pytest.importorskip(library)
    output = run("trl_dpo_grpo.py")
    assert "14 linear layers in 4 bits" in output and "streamed loss" in output and "left as it is" not in output
    losses = numbers(output, "'loss'")
    assert len(losses) >= 5 and losses[4] < losses[0]


def test_compiled_pieces_learn():
    pytest.importorskip("transformers")
    losses = numbers(run("hf_compile.py"), "'loss'")
    assert len(losses) == 5 and losses[-1] < losses[0]


def test_rewards_rise():
    pytest.importorskip("transformers")
    rewards = numbers(run("rl_logprobs.py"), "reward")
    assert len(rewards) == 8 and sum(rewards[-2:]) > sum(rewards[:2])


def test_a_retrieval_encoder_learns_to_find_long_documents():
    output = run("retrieval_encoder.py")
    assert "streamed" in output and "left as it is" not in output
    (before,), (after,) = numbers(output, "before training"), numbers(output, "after training")
    assert before < 0.2 and after > 0.5
