"""What `longtrain plan` can be asked about without a config: shapes of published models, and config.json files of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from longtrain.nn import LanguageModel, ModelConfig

SHAPES = {
    "llama3-8b": ModelConfig(vocab_size=128256, num_layers=32, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8,
                             rope_base=5e5),
    "llama3-70b": ModelConfig(vocab_size=128256, num_layers=80, hidden_size=8192, intermediate_size=28672, num_heads=64, num_kv_heads=8,
                              rope_base=5e5),
    "qwen3-8b": ModelConfig(vocab_size=151936, num_layers=36, hidden_size=4096, intermediate_size=12288, num_heads=32, num_kv_heads=8,
                            head_dim=128),
    "gpt-7b": ModelConfig(vocab_size=50257, num_layers=32, hidden_size=4096, intermediate_size=10923, num_heads=32, num_kv_heads=32),
}  # fmt: skip
"""Public configurations; gpt-7b is MEMO's 7B GPT (arXiv:2407.12117, table 1) with its MLP of 2 x 4E as three matrices of as many
parameters."""

KEYS = {
    "vocab_size": "vocab_size", "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
"""Ours by the name that config.json has."""

UNKNOWN = ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank", "linear_num_value_heads", "mamba_d_state")
"""What a Llama-style decoder has not: shapes with these are planned from a YAML file with model.hf, which probes the model itself."""

ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
GATED = ("silu", "swish")
"""Activations that transformers have in MLPs of three matrices alone. Of others some families have two, and config.json does not say so."""


def find_shape(name: str) -> ModelConfig | None:
    """Of a shape's name, or of a config.json or the directory that holds it; None where `name` is none of these. Raises ValueError for a
    config.json of a model that is no plain decoder."""
    if (found := SHAPES.get(name.lower())) is not None:
        return found
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data = data.get("text_config") or data
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no config.json of a model ({error}); correct it, or name another") from None
    data.setdefault("num_key_value_heads", data.get("num_attention_heads"))
    missing = [key for key in KEYS.values() if key not in data and key not in ("head_dim", "tie_word_embeddings")]
    strange = [key for key in UNKNOWN if data.get(key)]
    strange += [f"layers of kind {kind}" for kind in data.get("layer_types") or () if kind not in ("full_attention", "sliding_attention")]
    if missing or strange:
        what = f"lacks {missing[0]}" if missing else f"has {strange[0]}, and is no plain decoder"
        raise ValueError(f"{path}: {what}; plan it from a YAML file with model: {{hf: {path.parent}}}")
    shape = {ours: data[theirs] for ours, theirs in KEYS.items() if data.get(theirs) is not None}
    if next((data[key] for key in ACTIVATIONS if data.get(key)), GATED[0]) not in GATED:
        shape["intermediate_size"] = as_three(data, shape, path)
    window = data.get("sliding_window") if data.get("use_sliding_window", True) else None
    kinds = (data.get("layer_types") or layer_types(data, path)) if window else ()
    if "sliding_attention" in kinds:
        shape["window"] = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return ModelConfig(**shape)


def as_three(data: dict, shape: dict, path: Path) -> int:
    """F of an MLP of three matrices with as many parameters as that of a config.json has, by one layer of transformers' on the meta device.
    Raises ValueError where that cannot be had."""
    one_layer = {**data, "num_hidden_layers": 1, "layer_types": None}
    with in_transformers(path, "whether its MLPs have two matrices or three"):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**one_layer)
        with torch.device("meta"):
            layers = next(m for m in AutoModelForCausalLM.from_config(config).modules() if isinstance(m, torch.nn.ModuleList))
    width, head_dim = shape["hidden_size"], shape.get("head_dim") or shape["hidden_size"] // shape["num_heads"]
    attention = 2 * width * head_dim * (shape["num_heads"] + shape["num_kv_heads"])
    return round((sum(p.numel() for p in layers[0].parameters() if p.ndim == 2) - attention) / (3 * width))


def layer_types(data: dict, path: Path) -> list[str]:
    """Which layers of a config.json with a window have it, where it does not say so itself: all, unless its family knows better. Raises
    ValueError where that cannot be had."""
    with in_transformers(path, "which of its layers have a window"):
        from transformers import AutoConfig

        return getattr(AutoConfig.for_model(**data), "layer_types", None) or ["sliding_attention"] * data["num_hidden_layers"]


@contextmanager
def in_transformers(path: Path, asked: str) -> Iterator[None]:
    """What it does not have, or refuses, as a ValueError that says so."""
    try:
        yield
    except ImportError:
        found = f"{asked} is for transformers to say, which is not installed"
        raise ValueError(f'{path}: {found}; get it with: pip install "longtrain[hf]"') from None
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: transformers makes no model of it ({reason}); correct it, or name another") from None


def on_meta(config: ModelConfig, dtype: torch.dtype) -> LanguageModel:
    """The model as shapes alone, its gradients as training has them: float32."""
    with torch.device("meta"):
        model = LanguageModel(config)
    return with_wide_gradients(model.to(dtype))


def with_wide_gradients(model: torch.nn.Module) -> torch.nn.Module:
    """Gradients in float32, as `longtrain.train.optimizer` sets them where torch can."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.element_size() < 4 and hasattr(parameter, "grad_dtype"):
            parameter.grad_dtype = torch.float32
    return model
