"""What a run's YAML file may say: one frozen dataclass a section, a docstring under each field.

The docstrings are the reference; `field_docs` reads them for whoever wants to print one. Every `ValueError` here begins with the
setting it is about and a colon, so that the loader can say in which line of which file that setting stands.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from longtrain.config.bounds import at_least as _at_least
from longtrain.config.data import DataConfig
from longtrain.config.hf import HfModelConfig
from longtrain.config.memory import MemoryConfig
from longtrain.config.parallel import ParallelConfig
from longtrain.config.run import CheckpointConfig, LengthStage, MetricsConfig, OutputConfig, SpikeConfig, TrainConfig
from longtrain.nn import ModelConfig


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

    model: ModelConfig | HfModelConfig
    """The network: layers, widths, heads, attention windows; or, with `hf`, a model of transformers."""

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """How the step is streamed along the sequence."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How several processes share the work."""

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
        if isinstance(self.model, HfModelConfig):
            self._check_hf()
        else:
            self._check_own(self.model)
        if self.train.filter_lr is not None and not {"conv", "delta"} & {*(getattr(self.model, "layers", None) or ())}:
            raise ValueError(
                "train.filter_lr: has no effect: model.layers names no conv or delta layer; add one, or remove train.filter_lr"
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
                nearest = max(1, round(stage.tokens_per_update / stage.seq_len)) * stage.seq_len
                raise ValueError(
                    f"train.{f'length_schedule[{index}].' if own else ''}tokens_per_update: {stage.tokens_per_update} is not a multiple "
                    f"of the sequence length {stage.seq_len}; give {nearest}, or change the length"
                )

    def _check_own(self, model: ModelConfig) -> None:
        if self.data.source == "stdlib" and model.vocab_size < 256:
            raise ValueError(
                f"model.vocab_size: {model.vocab_size} is too small for the 256 byte values of data.source: stdlib; set 256 or more"
            )
        layers = model.num_layers
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
        for index, stage in enumerate(self.train.length_schedule):
            if stage.rope is not None:
                raise ValueError(
                    f"train.length_schedule[{index}].rope: is for models of transformers (model.hf); give rope_base or rope_scaling instead"
                )

    def _check_hf(self) -> None:
        if self.train.init is not None:
            raise ValueError("train.init: has no effect with model.hf, which names the weights itself; remove it")
        for index, stage in enumerate(self.train.length_schedule):
            for name, default in (("rope_base", None), ("rope_scaling", 1.0)):
                if getattr(stage, name) != default:
                    raise ValueError(
                        f"train.length_schedule[{index}].{name}: has no effect with model.hf; give rope, as in "
                        "rope: {rope_theta: 8000000} or rope: {rope_type: linear, factor: 4}"
                    )

    def stages(self) -> tuple[LengthStage, ...]:
        """The length schedule with everything filled in: the one stage that an empty one stands for, the tokens of an update, rotation."""
        written = self.train.length_schedule or (LengthStage(from_step=0, seq_len=self.data.seq_len),)
        model = self.model
        return tuple(
            replace(
                s,
                tokens_per_update=s.tokens_per_update or self.train.tokens_per_update or s.seq_len,
                **({"rope": s.rope or model.rope} if isinstance(model, HfModelConfig) else {"rope_base": s.rope_base or model.rope_base}),
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
