"""The plan: what is kept, recomputed and streamed, decided before the run. Data only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from longtrain.offload.place import DEVICE, DiskSettings, Place
from longtrain.span import Span

Fraction = float | tuple[float, ...]

ROUNDING = 1e-9
"""Of sums of shares: 1 - 0.7 - 0.3 is not 0."""


class InfeasibleBudget(ValueError):
    """No plan fits the budget; the message names the binding constraint and the cheapest change that fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Where the tokens of a stored tensor live: the last ones, which the backward pass needs first, on the device; those before them in
    host memory; the first ones on disk."""

    device: float = 0.0
    """Share of the tokens, the last ones, that stay."""

    host: float = 0.0
    """Share of the tokens, those before them, that go to host memory; all others go to disk."""

    compress: bool = False
    """FP8 with a scale for every 128 values, off the device. Lossy."""

    def __post_init__(self) -> None:
        shares = (self.device, self.host)
        if not all(isinstance(share, (int, float)) and 0 <= share <= 1 for share in shares) or sum(shares) > 1 + ROUNDING:
            raise ValueError(f"device and host must be shares from 0 to 1, together at most 1, found {self.device!r} and {self.host!r}")

    @property
    def disk(self) -> float:
        """Share of the tokens, the first ones, that go to disk."""
        left = 1 - self.device - self.host
        return left if left > ROUNDING else 0.0

    def place(self, span: Span, tokens: int) -> Place:
        """Where an extent goes: by its first token."""
        if span.start >= round((1 - self.device) * tokens):
            return DEVICE
        on_host = span.start >= round(self.disk * tokens)
        return Place(tier="host" if on_host else "disk", compress=self.compress)


STAY = Split(device=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offload:
    """What leaves the device between forward and backward. Each split is one for all layers, or a tuple with one a layer."""

    inputs: Split | tuple[Split, ...] = STAY
    """Hidden states between segments; a layer's split is for what it is given."""

    gradients: Split | tuple[Split, ...] = STAY
    """Gradients of the hidden states between segments, while the backward pass goes from one to the next."""

    outputs: Split | tuple[Split, ...] = STAY
    """Stored mixer outputs; their LSE goes with them, never compressed."""

    kv: Split | tuple[Split, ...] = STAY
    """Stored keys and values; and, uncompressed, the inputs of mixers that see the whole sequence."""

    host_bytes: int = 0
    """Size of the host arena."""

    disk: DiskSettings | None = None
    """The disk tier's directory and size."""

    staging_bytes: int = 64 * 2**20
    """Bytes on the device that are on their way to or from another tier; more are waited for."""

    def __post_init__(self) -> None:
        splits = [s for name in SPLITS for s in self._layers(name)]
        if self.disk is None and any(s.disk > 0 for s in splits):
            raise ValueError(
                "a split sends tokens to disk and offload.disk is not set; give it a path and a budget, or raise device or host"
            )
        if not self.host_bytes and any(s.host > 0 for s in splits):
            raise ValueError("a split sends tokens to the host and offload.host_bytes is 0; set it, or lower the splits' host share")

    def _layers(self, name: str) -> tuple[Split, ...]:
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,)

    def split(self, name: str, layer: int) -> Split:
        """The split of "inputs", "gradients", "outputs" or "kv" at `layer`; behind the last layer, its own."""
        splits = self._layers(name)
        return splits[min(layer, len(splits) - 1)]


SPLITS = ("inputs", "gradients", "outputs", "kv")


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

    kv_block_tokens: int | None = None
    """Keys and values of layers that see the whole sequence lie in the token store, all of them, in the tiers of `offload.kv`, and come
    to the device in blocks of so many tokens (a multiple of `chunk_tokens`), with their gradient sums in the backward pass. None: whole
    on the device while their layer runs."""

    boundaries: Literal["stream", "tensor"] = "stream"
    """`stream`: between layers only stand-ins travel, the contents live in the token store and are freed chunk by chunk.
    `tensor`: ordinary tensors, for models that look at hidden states between layers."""

    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at one time; by default as many as fill 8 MiB on a CPU, 2 GiB on a GPU (64 to 8,192)."""

    offload: Offload | None = None
    """What leaves the device, and for where; None keeps everything on it."""

    layer_fallback: Literal["error", "unstreamed"] = "error"
    """What happens to a layer that cannot be streamed: refuse the model, or leave that layer as it is."""

    predicted_peak: int | None = None
    """Bytes on the device at the peak of a step, as `lt.plan` predicted them; None for a plan made by hand."""

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "segment_layers", "loss_chunk_tokens", "kv_block_tokens"):
            value = getattr(self, name)
            if value is None and name in ("loss_chunk_tokens", "kv_block_tokens"):
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

        if self.kv_block_tokens is not None and self.kv_block_tokens % self.chunk_tokens:
            raise ValueError(f"kv_block_tokens must be a multiple of chunk_tokens ({self.chunk_tokens}), found {self.kv_block_tokens}")
        if self.boundaries == "tensor" and self.offload is not None and (self.offload.inputs, self.offload.gradients) != (STAY, STAY):
            raise ValueError('offload.inputs and offload.gradients move boundaries that stream; use boundaries="stream" with them')

    def with_chunks(self, tokens: int) -> Plan:
        """The same in chunks of so many tokens; a block of keys and values is of as many chunks as before."""
        blocks = self.kv_block_tokens and self.kv_block_tokens // self.chunk_tokens * tokens
        return replace(self, chunk_tokens=tokens, kv_block_tokens=blocks)

    def check_layers(self, layers: int) -> None:
        """Raise ValueError unless per-layer settings name every one of `layers` layers."""
        settings = {name: getattr(self, name) for name in ("store_outputs", "store_kv")}
        settings |= {f"offload.{name}": getattr(self.offload, name) for name in SPLITS} if self.offload else {}
        for name, value in settings.items():
            if isinstance(value, tuple) and len(value) != layers:
                raise ValueError(f"{name} names {len(value)} layers, the model has {layers}; give one number, or {layers} of them")

    def stored_outputs(self, layer: int, tokens: int) -> Span:
        """The token range of `layer` whose mixer outputs are kept."""
        return _last(self.store_outputs, layer, tokens)

    def stored_kv(self, layer: int, tokens: int) -> Span:
        """The token range of `layer` whose keys and values are kept."""
        return _last(self.store_kv, layer, tokens)

    def place(self, what: str, layer: int, tokens: int) -> Callable[[Span], Place] | None:
        """Where each span of a layer's "inputs", "gradients", "outputs" or "kv" goes; None when all of them stay."""
        split = STAY if self.offload is None else self.offload.split(what, layer)
        return None if split == STAY else partial(split.place, tokens=tokens)


def _last(fraction: Fraction, layer: int, tokens: int) -> Span:
    share = fraction[layer] if isinstance(fraction, tuple) else fraction
    return Span(tokens - round(share * tokens), tokens)
