"""Models of transformers small enough for a test, on disk, and runs of them."""

import json
from pathlib import Path

from tests.train.conftest import CONFIG

SMALL = dict(
    vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
)  # fmt: skip
FAMILIES = {
    "qwen3": {},
    "llama": dict(tie_word_embeddings=True),
    "gemma3_text": dict(layer_types=["sliding_attention", "full_attention"], sliding_window=9, query_pre_attn_scalar=8),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "gpt2": dict(n_embd=16, n_head=2, n_layer=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}


def write_shape(directory: Path, family: str = "qwen3", **changes) -> Path:
    """A `config.json` without weights; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "config.json"
    file.write_text(json.dumps({"model_type": family, **SMALL, **FAMILIES[family], **changes}))
    return file


def write_weights(directory: Path, family: str = "qwen3", **changes) -> Path:
    """The directory of a model with random weights, in two shards."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(write_shape(directory, family, **changes)))
    model.save_pretrained(directory, max_shard_size="20KB")
    return directory


def write_run(file: Path, hf: Path, texts: Path, out: Path) -> Path:
    """A run of `hf` on a few texts; returns `file`."""
    settings = CONFIG[CONFIG.index("data:") :].replace("TEXTS", str(texts)).replace("OUT", str(out))
    file.write_text(f"model:\n  hf: {hf}\nmemory:\n  chunk_tokens: 24\n{settings}")
    return file
