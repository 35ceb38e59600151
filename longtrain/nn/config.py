"""The shape of a language model, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A Llama-style decoder. Raises ValueError naming the setting that is wrong."""

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

    window: tuple[int | None, ...] | None = None
    """Tokens a query sees, itself included, as a pattern repeated over the layers; None in it is full attention.
    Example: [1024, null]."""

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

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
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
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"model.attention_dropout must be in [0, 1), found {self.attention_dropout!r}")
        if not 0 <= self.rope_fraction <= 1 or int(self.resolved_head_dim * self.rope_fraction) % 2:
            raise ValueError(
                f"model.rope_fraction {self.rope_fraction!r} of head_dim {self.resolved_head_dim} must be an even number of features"
            )
        for name in ("rope_base", "norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name} must be above 0, found {getattr(self, name)!r}")

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    def layer_window(self, index: int) -> int | None:
        """Tokens that a query of layer `index` sees; None for all."""
        return None if self.window is None else self.window[index % len(self.window)]
