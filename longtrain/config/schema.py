"""What a run's YAML file may say: one frozen dataclass a section, a docstring under each field.

The docstrings are the reference; `field_docs` reads them for whoever wants to print one. Every `ValueError` here begins with the
setting it is about and a colon, so that the loader can say in which line of which file that setting stands.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Literal

from longtrain.config.bounds import at_least as _at_least, between as _between
from longtrain.config.data import DataConfig
from longtrain.config.run import CheckpointConfig, LengthStage, MetricsConfig, OutputConfig, SpikeConfig, TrainConfig
from longtrain.nn import ModelConfig
from longtrain.units import parse_bytes

Fraction = float | tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """How the step is streamed: `budget` alone, and the planner chooses; or `chunk_tokens` and the keys below it, by hand.

    With neither, the model trains with PyTorch's own autograd and nothing is streamed.
    """

    budget: str | None = None
    """Memory that the run may take, such as 1.5GiB or 72GB (peak resident memory on a CPU, device memory on a GPU). Example: 1.5GiB."""

    chunk_tokens: int | None = None
    """Tokens streamed at a time. Larger chunks run faster and hold more activations. Example: 4096."""

    segment_layers: int | None = None
    """Consecutive layers that are streamed backward together, at most all of them. 1 when not given. Example: 2."""

    store_outputs: Fraction | None = None
    """Fraction (0 to 1) of the tokens whose attention outputs are kept from the forward pass instead of computed again: one
    number, or a list with one a layer. 1.0 when not given. Example: 0.5."""

    store_kv: Fraction | None = None
    """Fraction (0 to 1) of the tokens whose keys and values are kept from the forward pass: one number, or a list with one a
    layer. 0.0 when not given. Example: 0.5."""

    boundaries: Literal["stream", "tensor"] | None = None
    """`stream`: what travels between layers is freed chunk by chunk. `tensor`: ordinary tensors, for code that looks at hidden
    states between layers. `stream` when not given."""

    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at one time. When not given, as many as fill 8 MiB on a CPU, 2 GiB on a GPU (64 to 8,192).
    Example: 1024."""

    def __post_init__(self) -> None:
        by_hand = [f.name for f in fields(self) if f.name != "budget" and getattr(self, f.name) is not None]
        if self.budget is not None:
            parse_bytes(self.budget, "memory.budget")
            if by_hand:
                raise ValueError(
                    f"memory.{by_hand[0]}: contradicts memory.budget, with which the planner chooses it; remove one of the two"
                )
        elif by_hand and self.chunk_tokens is None:
            raise ValueError(f"memory.{by_hand[0]}: has no effect without memory.chunk_tokens; add chunk_tokens, or remove it")
        for name in ("chunk_tokens", "segment_layers", "loss_chunk_tokens"):
            if getattr(self, name) is not None:
                _at_least(f"memory.{name}", getattr(self, name), 1)
        for name in ("store_outputs", "store_kv"):
            value = getattr(self, name)
            for fraction in value if isinstance(value, tuple) else () if value is None else (value,):
                _between(f"memory.{name}", fraction, 0, 1)

    def plan_settings(self) -> dict:
        """The settings given by hand, as arguments of `lt.Plan`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "budget" and getattr(self, f.name) is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """What a validation looks at beside the mean loss: does the model use its context, does it find what stood far back."""

    first_bucket: int = 64
    """The loss is told by position in the document: below this many tokens, then in buckets that double, up to `data.seq_len`."""

    probes: tuple[Literal["recall", "needle"], ...] = ()
    """Questions made on the spot at every validation. `recall`: the value of a key that was given before among others. `needle`: the
    value of a random marker hidden in validation text. Example: [recall, needle]."""

    distances: tuple[int, ...] = ()
    """How many tokens back the answers of the probes stand. Empty: a sixteenth, a quarter, half and nearly all of `data.seq_len`.
    Example: [1024, 16000]."""

    examples: int = 64
    """Sequences that each probe asks at each distance."""

    def __post_init__(self) -> None:
        _at_least("eval.first_bucket", self.first_bucket, 1)
        _at_least("eval.examples", self.examples, 1)
        if self.distances and not self.probes:
            raise ValueError("eval.distances: has no effect without eval.probes; name probes, such as [recall], or remove it")
        for index, distance in enumerate(self.distances):
            _at_least(f"eval.distances[{index}]", distance, 2)
        if len(set(self.probes)) < len(self.probes):
            raise ValueError("eval.probes: names a probe twice; keep one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A run, whole. What one section must not say because of another is checked here."""

    model: ModelConfig
    """The network: layers, widths, heads, attention windows."""

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """How the step is streamed along the sequence."""

    data: DataConfig
    """What the model reads."""

    train: TrainConfig
    """The optimisation."""

    eval: EvalConfig = field(default_factory=EvalConfig)
    """What a validation looks at beside the mean loss."""

    spike: SpikeConfig = field(default_factory=SpikeConfig)
    """What happens when the loss jumps."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is saved so that the run can go on where it was."""

    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """Where the metrics go besides `metrics.jsonl`."""

    output: OutputConfig
    """Where the run writes."""

    def __post_init__(self) -> None:
        if self.data.source == "stdlib" and self.model.vocab_size < 256:
            raise ValueError(
                f"model.vocab_size: {self.model.vocab_size} is too small for the 256 byte values of data.source: stdlib; "
                "set 256 or more"
            )
        layers = self.model.num_layers
        for name in ("store_outputs", "store_kv"):
            value = getattr(self.memory, name)
            if isinstance(value, tuple) and len(value) != layers:
                raise ValueError(
                    f"memory.{name}: lists {len(value)} layers, the model has {layers}; give one number, or {layers} of them"
                )
        if self.memory.segment_layers is not None and self.memory.segment_layers > layers:
            raise ValueError(
                f"memory.segment_layers: {self.memory.segment_layers} is more than the {layers} layers of the model; "
                f"give at most {layers}"
            )
        schedule = self.train.length_schedule
        if schedule and schedule[-1].seq_len != self.data.seq_len:
            raise ValueError(
                f"train.length_schedule[{len(schedule) - 1}].seq_len: the last stage has {schedule[-1].seq_len} tokens, "
                f"data.seq_len says {self.data.seq_len}; make them equal"
            )
        for index, stage in enumerate(self.stages()):
            if stage.tokens_per_update % stage.seq_len:
                own = schedule and schedule[index].tokens_per_update is not None
                raise ValueError(
                    f"train.{f'length_schedule[{index}].' if own else ''}tokens_per_update: {stage.tokens_per_update} is not a multiple "
                    f"of the sequence length {stage.seq_len}; give {max(1, round(stage.tokens_per_update / stage.seq_len)) * stage.seq_len}, "
                    "or change the length"
                )

    def stages(self) -> tuple[LengthStage, ...]:
        """The length schedule with everything filled in: the one stage that an empty one stands for, the tokens of an update, the base."""
        written = self.train.length_schedule or (LengthStage(from_step=0, seq_len=self.data.seq_len),)
        return tuple(
            replace(
                s,
                tokens_per_update=s.tokens_per_update or self.train.tokens_per_update or s.seq_len,
                rope_base=s.rope_base or self.model.rope_base,
            )
            for s in written
        )


def field_docs(section: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body
    return {
        target.target.id: inspect.cleandoc(doc.value.value)
        for target, doc in pairwise(body)
        if isinstance(target, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }
