"""Models of transformers on several processes: whole or with adapters, sequences shared or not, as one process trains them."""

import pytest

from longtrain import cli
from longtrain.train.output import read_metrics
from tests.train.ranks import Ranks, assert_same_run

transformers = pytest.importorskip("transformers", reason='needs pip install "longtrain[hf]"')

from tests.train.tiny_hf import write_run, write_weights  # noqa: E402  (needs transformers)

SETTINGS = (
    "train.steps=4", "train.tokens_per_update=128", "train.validation_tokens=256", "train.eps=1e-3", "train.threads=1",
    "eval.probes=[recall]",
    "eval.examples=4",
)  # fmt: skip
LORA = "model.lora={rank: 4, alpha: 8, target_modules: [q_proj, down_proj]}"
LORA_DROPPED = LORA.replace("}", ", dropout: 0.2}")

pytestmark = [pytest.mark.usefixtures("no_picture"), pytest.mark.slow]


@pytest.mark.parametrize(
    "family, size, settings",
    [
        ("qwen3", 2, ("parallel.dp_shard=2",)),
        ("qwen3", 2, ("parallel.cp_ulysses=2",)),
        ("llama", 2, ("parallel.cp_ring=2", "parallel.way=queries", "data.packing=concatenate", "memory.segment_layers=2")),
        ("gemma3_text", 2, ("parallel.cp_ulysses=2", "memory.chunk_tokens=null")),
        ("gemma3_text", 4, ("parallel.dp_shard=2", "parallel.cp_ring=2")),
        ("lfm2", 2, ("parallel.cp_ulysses=2",)),
        ("qwen3", 2, ("parallel.dp_shard=2", LORA_DROPPED)),
        ("qwen3", 2, ("parallel.dp_replicate=2", LORA, "model.quantize=int8")),
        ("qwen3", 4, ("parallel.dp_shard=2", "parallel.cp_ulysses=2", LORA, "model.quantize=nf4")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_several_processes_train_as_one(family, size, settings, tmp_path, texts, out):
    """Losses, probes, and weights that transformers (of adapters: peft) reads. One process takes up what several have left."""
    if any("lora" in s for s in settings):
        pytest.importorskip("peft", reason='needs pip install "longtrain[lora]"')
    file = write_run(tmp_path / "hf.yaml", write_weights(tmp_path / "given", family), texts, out)
    given = dict(s.split("=", 1) for s in (*SETTINGS, *settings))
    ranks = Ranks(size, tmp_path, file, *(f"{key}={value}" for key, value in given.items()))
    assert ranks.wait() == [0] * size, ranks.said() + ranks.said(1)
    if given.get("memory.chunk_tokens") == "null":
        given["memory.chunk_tokens"] = "64"  # what is shared is streamed, as one chunk
    by_one = [f"{key}={value}" for key, value in given.items() if not key.startswith("parallel.")]
    assert cli.main(["train", str(file), *by_one, f"output.dir={tmp_path / 'alone'}"]) == 0
    assert_same_run(out, tmp_path / "alone")
    probes = [[r["probes"] for r in read_metrics(d / "metrics.jsonl") if r["kind"] == "validation"] for d in (out, tmp_path / "alone")]
    assert probes[0] == probes[1]
    assert cli.main(["train", "--eval", str(file), *by_one, f"output.dir={out}"]) == 0


@pytest.mark.parametrize("settings", [(), (LORA,)], ids=["whole", "adapters"])
def test_bfloat16_is_as_near_as_rounding(settings, tmp_path, texts, out):
    """Weights (of adapters the frozen ones) are gathered in bfloat16 from parts in float32 (in bfloat16)."""
    if settings:
        pytest.importorskip("peft", reason='needs pip install "longtrain[lora]"')
    file = write_run(tmp_path / "hf.yaml", write_weights(tmp_path / "given"), texts, out)
    settings = (*SETTINGS, "train.dtype=bfloat16", *settings)
    ranks = Ranks(2, tmp_path, file, *settings, "parallel.dp_shard=2", "memory.chunk_tokens=null", "memory.budget=4GiB")
    assert ranks.wait() == [0, 0], ranks.said() + ranks.said(1)
    assert cli.main(["train", str(file), *settings, f"output.dir={tmp_path / 'alone'}"]) == 0
    steps = [[r["loss"] for r in read_metrics(d / "metrics.jsonl") if r["kind"] == "step"] for d in (out, tmp_path / "alone")]
    assert steps[0] == pytest.approx(steps[1], rel=2**-8)
