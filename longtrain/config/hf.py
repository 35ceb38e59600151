"""The section `model` of a run that trains a model of transformers. Docstrings are the reference."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from longtrain.config.bounds import above_zero, at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How rotary positions reach beyond the lengths that a model was trained for; names and meanings are transformers'.

    Of a model that has rotary settings by kind of layer, those of its full-attention layers are changed: windowed layers see no further.
    """

    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3"] | None = None
    """`default`: no scaling. `linear`: positions divided by `factor`. `dynamic`: NTK, a base that grows with the longest sequence so far
    in an update. `yarn`: arXiv:2309.00071. `llama3`: as Llama 3.1. The model's own, with all its parameters, when not given."""

    rope_theta: float | None = None
    """Base of the rotary frequencies; the model's own when not given. Longer sequences want larger ones. Example: 8000000."""

    factor: float | None = None
    """How many times as far as `original_max_position_embeddings`. Example: 4."""

    original_max_position_embeddings: int | None = None
    """Positions the model was first trained for; its `max_position_embeddings` when not given (yarn, llama3). Example: 8192."""

    attention_factor: float | None = None
    """What cosine and sine are multiplied by; by `factor` when not given (yarn). Example: 1.2."""

    beta_fast: float | None = None
    """Rotations within the original length above which a frequency stays as it is; 32 when not given (yarn). Example: 32."""

    beta_slow: float | None = None
    """Rotations below which a frequency is divided by `factor`; 1 when not given (yarn). Example: 1."""

    mscale: float | None = None
    """With `mscale_all_dim`, how `attention_factor` follows from `factor` (yarn). Example: 1."""

    mscale_all_dim: float | None = None
    """See `mscale` (yarn). Example: 1."""

    truncate: bool | None = None
    """Whether the limits between fast and slow are rounded to whole frequencies; true when not given (yarn)."""

    low_freq_factor: float | None = None
    """The original length divided by this is the wavelength from which frequencies are divided by `factor` (llama3). Example: 1."""

    high_freq_factor: float | None = None
    """The original length divided by this is the wavelength up to which they stay as they are (llama3). Example: 4."""

    def __post_init__(self) -> None:
        given = self.given()
        for name in given:
            if name not in ("rope_type", "rope_theta") and name not in ROPE_SETTINGS.get(self.rope_type, ()):
                said = f"with rope_type: {self.rope_type}" if self.rope_type else "without rope_type"
                raise ValueError(f"{name} has no effect {said}; remove it, or give the rope_type that it belongs to")
        for name in ROPE_NEEDS.get(self.rope_type, ()):
            if name not in given:
                raise ValueError(f"{name} is missing, and rope_type: {self.rope_type} needs it; add `{name}: ...`")
        for name, value in given.items():
            if not isinstance(value, (str, bool)) and not value > 0:
                raise ValueError(f"{name} must be above 0, found {value:g}; give a positive number")
        if self.factor is not None and self.factor < 1:
            raise ValueError(f"factor must be at least 1, found {self.factor:g}; 4 reaches four times as far")
        if self.rope_type == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            found = f"high_freq_factor {self.high_freq_factor:g} must be above low_freq_factor {self.low_freq_factor:g}"
            raise ValueError(f"{found}; Llama 3.1 has 4 and 1")

    def given(self) -> dict:
        """The settings that were written, by transformers' names."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


ROPE_SETTINGS = {
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    },
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}  # fmt: skip
ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv:2106.09685) instead of the weights: the weights stay as they are, without gradients."""

    rank: int | None = None
    """Rank of the adapters; 16 when not given. Example: 16."""

    alpha: float | None = None
    """What they give is multiplied by `alpha` / `rank`; 32 when not given. Example: 32."""

    target_modules: str | tuple[str, ...] | None = None
    """Names (or ends of names) of the linear layers that get one; `all-linear`, when not given: every one but the head.
    Example: [q_proj, v_proj]."""

    dropout: float | None = None
    """Dropout on what goes into an adapter while training; none when not given. Example: 0.05."""

    adapter: str | None = None
    """Directory of an adapter of that model, as peft and longtrain save it: trained on, with the settings that it came with.
    Example: out/books/model."""

    def __post_init__(self) -> None:
        if self.adapter is not None:
            if not self.adapter.strip():
                raise ValueError("model.lora.adapter: is empty; name the directory of an adapter, or remove it")
            for name in ("rank", "alpha", "target_modules", "dropout"):
                if getattr(self, name) is not None:
                    raise ValueError(f"model.lora.{name}: has no effect with adapter, which has its own; remove one of the two")
            return
        if self.rank is not None:
            at_least("model.lora.rank", self.rank, 1)
        if self.alpha is not None:
            above_zero("model.lora.alpha", self.alpha)
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"model.lora.dropout: must be from 0 to below 1, found {self.dropout:g}; 0 is none")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise ValueError(
                f"model.lora.target_modules: {self.target_modules!r} is one name; write a list, [{self.target_modules}], or all-linear"
            )
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("model.lora.target_modules: is empty; list names of linear layers, or write all-linear")


@dataclass(frozen=True, slots=True, kw_only=True)
class HfModelConfig:
    """A causal language model of transformers, of any family (`pip install longtrain[hf]`)."""

    hf: str
    """A directory with `config.json` and safetensors, as `save_pretrained` writes it: trained from its weights. Or the path of a
    `config.json` itself: random weights of that shape, drawn with `train.seed`. Nothing is downloaded. Example: models/qwen3-0.6b."""

    lora: LoraConfig | None = None
    """Train adapters instead of the weights (`pip install longtrain[lora]`). Example: {rank: 16, target_modules: [q_proj, v_proj]}."""

    quantize: Literal["int8", "float8", "nf4"] | None = None
    """Bits that the weights of linear layers are kept in beside adapters, in blocks of 64 with a scale each: 8 (`int8`, `float8`), or 4
    (`nf4`, arXiv:2305.14314). Lossy. The head, embeddings and fused experts stay as they are. Example: nf4."""

    rope: RopeConfig | None = None
    """How positions reach beyond what the model was trained for; needed when `data.seq_len` is longer than that.
    Example: {rope_type: yarn, factor: 4}."""

    def __post_init__(self) -> None:
        if not self.hf.strip():
            raise ValueError("model.hf: is empty; name a directory with a model of transformers, or a config.json")
        if self.quantize is not None and self.lora is None:
            raise ValueError("model.quantize: is for weights that stay as they are, and without model.lora all are trained; add lora: {}")
