"""`longtrain export RUN OUT`: a checkpoint's weights as Hugging Face keeps them, sharded safetensors with an index and a `config.json`.

A run on a model of transformers gives that model, or its adapter. Of longtrain's own models, one that transformers' Llama or Mistral
computes exactly is written as one of these; any other with `model_type: longtrain`, which transformers refuses instead of computing
something else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from longtrain.config import Config, Locations, load_config
from longtrain.config.hf import HfModelConfig
from longtrain.config.run import LengthStage
from longtrain.errors import RunError
from longtrain.files import said_plainly
from longtrain.nn import ModelConfig
from longtrain.train import checkpoint as on_disk
from longtrain.train.model import build_model
from longtrain.train.output import CHECKPOINTS
from longtrain.train.schedule import stage_at
from longtrain.train.state import load_checkpoint_weights
from longtrain.train.weights import INDEX, SINGLE, cast
from longtrain.units import format_bytes

HF_CONFIG = "config.json"


def run(given: str, out: str, dtype: str, shard_bytes: int) -> int:
    """`longtrain export RUN OUT`: the newest whole checkpoint of a run (or one given by its path) as a Hugging Face directory."""
    path = Path(given)
    refused: dict[Path, str] = {}
    if not path.is_dir():
        raise RunError(f"there is no directory {path} (from {Path.cwd()}); name a run's directory, or a whole checkpoint")
    if (path / CHECKPOINTS).is_dir():
        checkpoint, refused = on_disk.newest_whole(path / CHECKPOINTS)
        for problem in refused.values():
            print(f"{problem}; the one before it is used")
        if checkpoint is None:
            raise RunError(f"{path} holds no whole checkpoint; train first, or name another run")
    else:
        checkpoint = path
        try:
            on_disk.check(checkpoint)
        except on_disk.DamagedCheckpoint as error:
            raise RunError(f"{error}; name a run's directory, or a whole checkpoint") from None
    directory = Path(out)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RunError(f"{directory} is {'not empty' if directory.is_dir() else 'a file'}; name another directory")
    facts = on_disk.read_facts(checkpoint)
    config, where = load_config(checkpoint / on_disk.CONFIG)
    stage = stage_at(config, facts["step"] - 1)
    if isinstance(config.model, HfModelConfig):
        return export_pretrained(checkpoint, config, where, stage, directory, dtype, shard_bytes)
    names = {name.removeprefix("weights."): name for name in facts["tensors"] if name.startswith("weights.")}
    names |= {name.removeprefix("model."): name for name in facts["tensors"] if name.startswith("model.")}
    held = {key: torch.empty(facts["tensors"][key]) for key in names.values()}
    with on_disk.one_process():
        on_disk.read_tensors(checkpoint, held)
    dtype = config.train.dtype if dtype == "trained" else dtype
    weights = {name: held[key].to(getattr(torch, dtype)) for name, key in names.items()}
    with said_plainly(directory):
        directory.mkdir(parents=True, exist_ok=True)
        files = write_shards(directory, weights, shard_bytes)
        described = hf_config(config.model, stage, dtype)
        (directory / HF_CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    size = sum(t.nbytes for t in weights.values())
    print(
        f"{checkpoint} as {described['model_type']}: {len(weights)} tensors, {dtype}, {format_bytes(size)} in {files} files in {directory}"
    )
    if described["model_type"] == "longtrain":
        why = "a pattern of windows or of layers, or partial rotation"
        print(f"transformers has no class that computes this model ({why}); longtrain reads it as train.init")
    return 0


def export_pretrained(
    checkpoint: Path, config: Config, where: Locations, stage: LengthStage, directory: Path, dtype: str, shard_bytes: int
) -> int:
    """The transformers model of a run with the weights of a checkpoint, or its adapter."""
    from longtrain.train import pretrained  # for transformers, an extra

    torch.manual_seed(config.train.seed)  # frozen weights may be drawn with it
    model, set_rotary, _ = build_model(config, where)
    try:
        load_checkpoint_weights(model, checkpoint)
    except ValueError as error:
        raise RunError(str(error)) from None
    set_rotary(stage)
    wanted = getattr(torch, config.train.dtype if dtype == "trained" else dtype)
    cast(model, wanted)
    files = pretrained.save(model, config, directory, shard_bytes)
    kind = "an adapter" if config.model.lora else type(model).__name__
    print(f"{checkpoint} as {kind}, {str(wanted).removeprefix('torch.')}, in {directory}: {', '.join(files)}")
    return 0


def write_shards(directory: Path, weights: Mapping[str, Tensor], shard_bytes: int) -> int:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors` and their index; a tensor is never split. Returns N."""
    size = sum(t.nbytes for t in weights.values())
    free = shutil.disk_usage(directory).free
    if free < size:
        raise RunError(
            f"{directory}: {format_bytes(free)} are free, the weights take {format_bytes(size)}; make room, or name another disk"
        )
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor.contiguous()
    names = [SINGLE] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, part in zip(names, shards, strict=True):
        save_file(part, str(directory / name), metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": size},
            "weight_map": {key: name for name, part in zip(names, shards, strict=True) for key in part},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(shards)


def hf_config(model: ModelConfig, stage: LengthStage, dtype: str) -> dict:
    """`config.json`; the rotary settings are those of the length the weights were last trained at."""
    windows = {model.layer_window(layer) for layer in range(model.num_layers)}
    window = windows.pop() if len(windows) == 1 else 0
    exact = window != 0 and model.rope_fraction == 1 and all(kind in ("attention", "window") for kind in model.layers or ())
    kind, name = ("llama", "LlamaForCausalLM") if window is None else ("mistral", "MistralForCausalLM")
    described = {
        "architectures": [name if exact else "LongtrainLanguageModel"],
        "model_type": kind if exact else "longtrain",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.resolved_head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": stage.seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": stage.rope_base,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": model.attention_dropout,
        "mlp_bias": False,
        "initializer_range": model.initializer_range,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if stage.rope_scaling != 1:
        described["rope_scaling"] = {"rope_type": "linear", "factor": stage.rope_scaling}
    if exact and window is not None:
        described["sliding_window"] = window
    if not exact:
        hybrid = ("layers", "conv_taps", "conv_implicit", "conv_squash", "lact_chunk") if model.layers else ()
        described |= {name: getattr(model, name) for name in ("window", "rope_fraction", *hybrid)}
    return described
