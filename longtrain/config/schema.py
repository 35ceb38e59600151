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

from longtrain.nn import ModelConfig
from longtrain.units import parse_bytes

Fraction = float | tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """How the step is streamed: `budget` alone, and the planner chooses; or `chunk_tokens` and the keys below it, by hand.

    With neither, the model trains with PyTorch's own autograd and nothing is streamed.
    """

    budget: str | None = None
    """Memory that the run may take, such as 1.5GiB or 72GB (peak resident memory on a CPU, device memory on a GPU)."""

    chunk_tokens: int | None = None
    """Tokens streamed at a time. Larger chunks run faster and hold more activations. Example: 4096."""

    segment_layers: int | None = None
    """Consecutive layers that are streamed backward together, at most all of them. 1 when not given."""

    store_outputs: Fraction | None = None
    """Fraction (0 to 1) of the tokens whose attention outputs are kept from the forward pass instead of computed again: one
    number, or a list with one a layer. 1.0 when not given."""

    store_kv: Fraction | None = None
    """Fraction (0 to 1) of the tokens whose keys and values are kept from the forward pass: one number, or a list with one a
    layer. 0.0 when not given."""

    boundaries: Literal["stream", "tensor"] | None = None
    """`stream`: what travels between layers is freed chunk by chunk. `tensor`: ordinary tensors, for code that looks at hidden
    states between layers. `stream` when not given."""

    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at one time. When not given, as many as fill 8 MiB on a CPU, 2 GiB on a GPU (64 to 8,192)."""

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
class DataConfig:
    """What the model reads. Tokens are bytes (256 of them); documents never see each other."""

    source: Literal["stdlib", "text"] = "stdlib"
    """`stdlib`: the source code of the running Python's own standard library, which is on every machine. `text`: `files`."""

    files: tuple[str, ...] = ()
    """Files, directories or glob patterns (`**` goes through directories) for `source: text`; each file is one document.
    Relative paths start at the current directory. Example: [books/*.txt]."""

    seq_len: int
    """Tokens in one training sequence. Validation uses the same length. Example: 16384."""

    packing: Literal["best_fit", "one_document"] = "best_fit"
    """`best_fit`: documents longer than `seq_len` are cut into pieces, and pieces share a sequence where they fit. `one_document`:
    one piece a sequence, the rest padding."""

    min_document_tokens: int = 0
    """Documents shorter than this are left out: raise it for a run that should see long contexts only."""

    validation_fraction: float = 0.05
    """Share of the tokens that is held out, by whole documents, drawn with `seed`."""

    seed: int = 0
    """Draws the validation documents and the order of the sequences."""

    def __post_init__(self) -> None:
        if self.source == "text" and not self.files:
            raise ValueError("data.files: is missing, and source: text reads nothing else; list files, directories or globs")
        if self.source != "text" and self.files:
            raise ValueError(f"data.files: has no effect with source: {self.source}; set source: text, or remove it")
        _at_least("data.seq_len", self.seq_len, 2)
        _at_least("data.min_document_tokens", self.min_document_tokens, 0)
        _between("data.validation_fraction", self.validation_fraction, 0.0001, 0.5)
        _at_least("data.seed", self.seed, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthStage:
    """From which update on the run reads sequences of which length."""

    from_step: int
    """The first update (counted from 0) of this stage."""

    seq_len: int
    """Tokens in one sequence during this stage."""

    tokens_per_update: int | None = None
    """Tokens accumulated into one update during this stage, a multiple of its `seq_len`; `train.tokens_per_update` when not given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The optimisation: how many updates, of how many tokens, with which AdamW."""

    steps: int
    """Updates of the parameters."""

    length_schedule: tuple[LengthStage, ...] = ()
    """Lets a run begin with short sequences: a list of {from_step, seq_len} and, where it differs, tokens_per_update; the first from
    step 0, the last of `data.seq_len`. Empty: `data.seq_len` throughout. Example: [{from_step: 0, seq_len: 4096}, {from_step: 200, seq_len: 16384}]."""

    tokens_per_update: int | None = None
    """Tokens whose gradients are accumulated, one sequence at a time, into one update: a multiple of every sequence length. The
    loss is normalised by the targets of the whole update. One sequence an update when not given."""

    lr: float = 3e-4
    """Learning rate at the end of the warm-up."""

    min_lr_ratio: float = 0.1
    """The last update's learning rate as a share of `lr`."""

    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly to `lr`."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up: down to `min_lr_ratio` of `lr` along half a cosine, or constant."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""

    eps: float = 1e-8
    """AdamW's epsilon."""

    weight_decay: float = 0.1
    """AdamW's weight decay, on matrices and embeddings (not on norms)."""

    grad_clip: float | None = 1.0
    """Gradients are scaled down to this norm where theirs is larger; null for no clipping."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16`: weights and activations in bfloat16, while gradients, master weights and AdamW's moments are float32."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes the GPU where there is one."""

    seed: int = 0
    """Draws the initial weights (and dropout)."""

    validate_every: int | None = None
    """Updates between two validations; null for one at the end only. The last update is always validated."""

    validation_tokens: int | None = None
    """Tokens of the validation documents that are read each time, in whole sequences; null for all of them."""

    save_every: int | None = None
    """Updates between two saves of the weights; null for one at the end only."""

    threads: int | None = None
    """CPU threads; null for PyTorch's own choice. Losses repeat bit for bit at the same number only."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup_steps", 0), ("seed", 0)):
            _at_least(f"train.{name}", getattr(self, name), least)
        for name in ("tokens_per_update", "validate_every", "validation_tokens", "save_every", "threads"):
            if getattr(self, name) is not None:
                _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("lr", "eps"):
            _above_zero(f"train.{name}", getattr(self, name))
        if self.grad_clip is not None:
            _above_zero("train.grad_clip", self.grad_clip)
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"train.betas: must be from 0 to below 1, found {beta:g}; 0.9 and 0.95 are usual")
        _between("train.min_lr_ratio", self.min_lr_ratio, 0, 1)
        _between("train.weight_decay", self.weight_decay, 0, 10)
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"train.warmup_steps: {self.warmup_steps} leaves none of the {self.steps} steps after the warm-up; "
                "lower it, or raise train.steps"
            )
        starts = [stage.from_step for stage in self.length_schedule]
        for index, stage in enumerate(self.length_schedule):
            _at_least(f"train.length_schedule[{index}].seq_len", stage.seq_len, 2)
            if stage.tokens_per_update is not None:
                _at_least(f"train.length_schedule[{index}].tokens_per_update", stage.tokens_per_update, 1)
        if starts and starts[0] != 0:
            raise ValueError(f"train.length_schedule[0].from_step: must be 0, found {starts[0]}; say what the run begins with")
        for index, (before, start) in enumerate(pairwise(starts), start=1):
            if start <= before:
                raise ValueError(
                    f"train.length_schedule[{index}].from_step: {start} does not come after {before}; list the stages in order"
                )
        if starts and starts[-1] >= self.steps:
            raise ValueError(
                f"train.length_schedule[{len(starts) - 1}].from_step: {starts[-1]} is never reached in {self.steps} steps; "
                "lower it, or raise train.steps"
            )


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
class OutputConfig:
    """Where the run writes."""

    dir: str
    """Directory for weights, metrics, plot and the resolved configuration; made when missing."""

    overwrite: bool = False
    """Whether a run that already stands in `dir` may be replaced; refused otherwise."""

    def __post_init__(self) -> None:
        if not self.dir.strip():
            raise ValueError("output.dir: is empty; name a directory, such as runs/first")


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
        """The length schedule with everything filled in: the one stage that an empty one stands for, the tokens of an update."""
        written = self.train.length_schedule or (LengthStage(from_step=0, seq_len=self.data.seq_len),)
        return tuple(replace(s, tokens_per_update=s.tokens_per_update or self.train.tokens_per_update or s.seq_len) for s in written)


def field_docs(section: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body
    return {
        target.target.id: inspect.cleandoc(doc.value.value)
        for target, doc in pairwise(body)
        if isinstance(target, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }


def _at_least(setting: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{setting}: must be at least {least}, found {value}; raise it")


def _above_zero(setting: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{setting}: must be above 0, found {value:g}; give a positive number")


def _between(setting: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{setting}: must be from {low:g} to {high:g}, found {value:g}; choose a value in that range")
