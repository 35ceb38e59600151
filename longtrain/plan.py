"""The plan: what is kept, recomputed and streamed, decided before the run. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longtrain.span import Span

Fraction = float | tuple[float, ...]


class InfeasibleBudget(ValueError):
    """No plan fits the budget; the message names the binding constraint and the cheapest change that fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model's step is streamed along the sequence. Raises ValueError naming the setting that is wrong."""

    chunk_tokens: int
    """Tokens streamed at a time, C. Larger chunks waste less on per-chunk overhead and hold more activations."""

    segment_layers: int = 1
    """Consecutive layers streamed backward together, k: one stored input and k carries per segment."""

    store_outputs: Fraction = 1.0
    """Fraction of the tokens (the last ones) whose attention outputs and LSE are kept from the forward pass, so that attention
    is not computed again for them; one number, or one a layer. Costs 2 H D + 4 H bytes a token and layer in bf16."""

    store_kv: Fraction = 0.0
    """Fraction of the tokens (the last ones) whose keys and values are kept from the forward pass; one number, or one a layer."""

    boundaries: Literal["stream", "tensor"] = "stream"
    """`stream`: between layers only stand-ins travel, the contents live in the token store and are freed chunk by chunk.
    `tensor`: ordinary tensors, for models that look at hidden states between layers."""

    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at one time; by default as many as fill 8 MiB on a CPU, 2 GiB on a GPU (64 to 8,192)."""

    layer_fallback: Literal["error", "unstreamed"] = "error"
    """What happens to a layer that cannot be streamed: refuse the model, or leave that layer as it is."""

    predicted_peak: int | None = None
    """Bytes on the device at the peak of a step, as `lt.plan` predicted them; None for a plan made by hand."""

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "segment_layers", "loss_chunk_tokens"):
            value = getattr(self, name)
            if value is None and name == "loss_chunk_tokens":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, found {value!r}")
        for name in ("store_outputs", "store_kv"):
            value = getattr(self, name)
            for fraction in value if isinstance(value, tuple) else (value,):
                if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
                    raise ValueError(f"{name} must be a fraction from 0 to 1 (or a tuple of them, one a layer), found {value!r}")
        for name, allowed in (("boundaries", ("stream", "tensor")), ("layer_fallback", ("error", "unstreamed"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, found {getattr(self, name)!r}")

    def check_layers(self, layers: int) -> None:
        """Raise ValueError unless per-layer settings name every one of `layers` layers."""
        for name in ("store_outputs", "store_kv"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != layers:
                raise ValueError(f"{name} names {len(value)} layers, the model has {layers}; give one number, or {layers} of them")

    def stored_outputs(self, layer: int, tokens: int) -> Span:
        """The token range of `layer` whose mixer outputs are kept."""
        return _last(self.store_outputs, layer, tokens)

    def stored_kv(self, layer: int, tokens: int) -> Span:
        """The token range of `layer` whose keys and values are kept."""
        return _last(self.store_kv, layer, tokens)


def _last(fraction: Fraction, layer: int, tokens: int) -> Span:
    share = fraction[layer] if isinstance(fraction, tuple) else fraction
    return Span(tokens - round(share * tokens), tokens)
