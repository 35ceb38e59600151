"""The shape of a language model, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from longtrain.nn.filters import LARGEST_SQUASH, initial_deviation

LayerKind = Literal["attention", "window", "linear", "delta", "lact", "conv"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A Llama-style decoder, all attention or with other mixers in some layers. Raises ValueError naming the setting that is wrong."""

    vocab_size: int
    """Number of token ids, V. Example: 256."""

    num_layers: int
    """Decoder layers, L. Example: 32."""

    hidden_size: int
    """Model width, E. Example: 4096."""

    intermediate_size: int
    """Width inside the feed-forward network, F. Example: 14336."""

    num_heads: int
    """Query heads, H. Example: 32."""

    num_kv_heads: int
    """Key and value heads, K; divides `num_heads`. Example: 8."""

    head_dim: int | None = None
    """Features of a head, D; `hidden_size / num_heads` by default. Example: 128."""

    layers: tuple[LayerKind, ...] | None = None
    """What mixes the tokens, as a pattern repeated over the layers; attention in all of them by default. `attention`: full. `window`:
    attention over the last `window` tokens. `linear`: gated linear attention. `delta`: the gated delta rule. `lact`: test-time training
    once in `lact_chunk` tokens. `conv`: gated long convolution of `conv_taps` taps. Example: [conv, window, attention, linear]."""

    window: tuple[int | None, ...] | None = None
    """Tokens a query sees, itself included, as a pattern repeated over the layers; None in it is full attention. With `layers`: over
    those of kind `window`, full attention being a kind of its own. Example: [1024, null]."""

    conv_taps: int = 128
    """Tokens that a layer of kind `conv` sees, itself included. With at most `memory.chunk_tokens` it streams chunk by chunk, with more
    whole, a group of channels at a time."""

    conv_implicit: bool = False
    """The filters of `conv` layers are made by a small network, for sight as long as the sequence at few parameters."""

    conv_squash: float = 0.003
    """By how much the taps of `conv` layers are pulled towards zero, the smaller ones to it; 0 for not at all. Not of implicit filters."""

    lact_chunk: int = 512
    """Tokens after which the fast weights of a `lact` layer change."""

    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""

    rope_fraction: float = 1.0
    """Share of each head's features that is rotated."""

    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""

    tie_embeddings: bool = False
    """The head uses the embedding's weight."""

    attention_dropout: float = 0.0
    """Dropout on attention probabilities while training."""

    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""

    embedding_range: float | None = None
    """Standard deviation of the initial embeddings; `initializer_range` when not given. Larger ones are heard beside what the layers add to
    them from the start. Example: 0.5."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "conv_taps", "lact_chunk"):
            value = getattr(self, name)
            if value is None and name == "head_dim":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"model.{name} must be an integer of at least 1, found {value!r}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_heads {self.num_heads}; set model.head_dim"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"model.num_kv_heads {self.num_kv_heads} does not divide model.num_heads {self.num_heads}")
        if self.window is not None:
            if not isinstance(self.window, tuple) or not self.window:
                raise ValueError(f"model.window must be a list of token counts and nulls, found {self.window!r}")
            for width in self.window:
                if width is not None and (not isinstance(width, int) or width < 1):
                    raise ValueError(f"model.window entries must be null (full) or at least 1 token, found {width!r}")
        if self.layers is not None:
            self._check_layers()
        for name, kind in (("conv_taps", "conv"), ("conv_implicit", "conv"), ("conv_squash", "conv"), ("lact_chunk", "lact")):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default and kind not in (self.layers or ()):
                raise ValueError(f"model.{name} has no effect: model.layers names no {kind} layer; add one, or remove model.{name}")
        self._check_squash()
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"model.attention_dropout must be in [0, 1), found {self.attention_dropout!r}")
        if not 0 <= self.rope_fraction <= 1 or int(self.resolved_head_dim * self.rope_fraction) % 2:
            raise ValueError(
                f"model.rope_fraction {self.rope_fraction!r} of head_dim {self.resolved_head_dim} must be an even number of features"
            )
        for name in ("rope_base", "norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name} must be above 0, found {getattr(self, name)!r}")
        if self.embedding_range is not None and not self.embedding_range > 0:
            raise ValueError(f"model.embedding_range must be above 0, found {self.embedding_range!r}")
        if self.embedding_range is not None and self.tie_embeddings:
            raise ValueError(
                "model.embedding_range would be the head's too, which model.tie_embeddings makes of the embedding; remove one of them"
            )

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    def layer_kind(self, index: int) -> LayerKind:
        """What mixes the tokens in layer `index`."""
        if self.layers is not None:
            return self.layers[index % len(self.layers)]
        return "attention" if self.layer_window(index) is None else "window"

    def layer_window(self, index: int) -> int | None:
        """Tokens that a query of layer `index` sees, if its mixer is attention; None for all."""
        if self.window is None or self.layers is not None and self.layer_kind(index) != "window":
            return None
        if self.layers is not None:
            index = sum(self.layer_kind(i) == "window" for i in range(index))
        return self.window[index % len(self.window)]

    def _check_squash(self) -> None:
        if self.conv_implicit and self.conv_squash != type(self).__dataclass_fields__["conv_squash"].default:
            raise ValueError("model.conv_squash has no effect on filters of model.conv_implicit; remove one of them")
        deviation = initial_deviation(self.conv_taps)
        if not 0 <= self.conv_squash <= LARGEST_SQUASH * deviation:
            raise ValueError(
                f"model.conv_squash must be from 0 to {LARGEST_SQUASH * deviation:g}, {LARGEST_SQUASH:g} deviations of the taps "
                f"as they begin, found {self.conv_squash!r}: nearly all would be zero and never train; give about {0.15 * deviation:.2g}"
            )

    def _check_layers(self) -> None:
        kinds = get_args(LayerKind)
        if not isinstance(self.layers, tuple) or not self.layers or any(kind not in kinds for kind in self.layers):
            raise ValueError(f"model.layers must be a list of {', '.join(kinds)}, found {self.layers!r}")
        windowed = "window" in self.layers
        if windowed and (self.window is None or None in self.window):
            raise ValueError(
                f"model.layers names window layers and model.window is {self.window!r}; give it their widths, such as [1024] "
                "(full attention is the kind attention)"
            )
        if self.window is not None and not windowed:
            raise ValueError("model.window has no effect: model.layers names no window layer; add one, or remove model.window")
