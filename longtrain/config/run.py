"""What a run's YAML file may say of the run itself: how it trains, what it saves, what it reports and where it writes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from longtrain.config.bounds import above_zero, at_least, between
from longtrain.config.hf import RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthStage:
    """From which update on the run reads sequences of which length."""

    from_step: int
    """The first update (counted from 0) of this stage. Example: 200."""

    seq_len: int
    """Tokens in one sequence during this stage. Example: 16384."""

    tokens_per_update: int | None = None
    """Tokens accumulated into one update during this stage, a multiple of its `seq_len`; `train.tokens_per_update` when not given.
    Example: 131072."""

    rope_base: float | None = None
    """Base of the rotary frequencies during this stage; `model.rope_base` when not given. Longer sequences want larger ones.
    Example: 500000."""

    rope_scaling: float = 1.0
    """Positions are divided by this before they are rotated during this stage (position interpolation, arXiv:2306.15595)."""

    rope: RopeConfig | None = None
    """For `model.hf`, in place of `rope_base` and `rope_scaling`: rotary positions during this stage; `model.rope` when not given.
    Example: {rope_theta: 8000000}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The optimisation: how many updates, of how many tokens, with which AdamW."""

    steps: int
    """Updates of the parameters. Example: 240."""

    length_schedule: tuple[LengthStage, ...] = ()
    """Lets a run begin with short sequences: a list of {from_step, seq_len} and, where they differ, tokens_per_update, rope_base,
    rope_scaling or rope; the first from step 0, the last of `data.seq_len`. Empty: `data.seq_len` throughout. Example: [{from_step: 0,
    seq_len: 4096}, {from_step: 200, seq_len: 16384}]."""

    tokens_per_update: int | None = None
    """Tokens whose gradients are accumulated, one sequence at a time, into one update: a multiple of every sequence length. The
    loss is normalised by the targets of the whole update. One sequence an update when not given. Example: 131072."""

    lr: float = 3e-4
    """Learning rate at the end of the warm-up."""

    min_lr_ratio: float = 0.1
    """The last update's learning rate as a share of `lr`."""

    filter_lr: float | None = None
    """Learning rate of the filters of `conv` layers, and of the short ones in `delta` layers, at the end of the warm-up, on the same
    schedule; `lr` when not given. Example: 1e-3."""

    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly to `lr`."""

    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up. `cosine`, `linear`: down to `min_lr_ratio` of `lr` along half a cosine or a
    line. `wsd` (warm-up, stable, decay): constant, then down over the last `decay_steps`. `constant`: as it is."""

    decay_steps: int | None = None
    """Updates of the decay that ends a `wsd` schedule; a fifth of the run when not given. Example: 50."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""

    eps: float = 1e-8
    """AdamW's epsilon."""

    weight_decay: float = 0.1
    """AdamW's weight decay, on matrices and embeddings (not on norms, nor on the filters of `conv` layers)."""

    grad_clip: float | None = 1.0
    """Gradients are scaled down to this norm where theirs is larger; null for no clipping."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16`: weights and activations in bfloat16, while gradients, master weights and AdamW's moments are float32."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes the GPU where there is one."""

    kernel_fallback: Literal["error", "warn"] = "error"
    """What happens without fast attention kernels (on a CPU the C++ extension was not built, on a GPU no kernel serves the model):
    `error` refuses the run, `warn` says so and computes attention in plain torch, many times slower."""

    seed: int = 0
    """Draws the initial weights (and dropout)."""

    validate_every: int | None = None
    """Updates between two validations; null for one at the end only. The last update is always validated. Example: 60."""

    validation_tokens: int | None = None
    """Tokens of the validation documents that are read each time, in whole sequences; null for all of them. Example: 131072."""

    init: str | None = None
    """Weights that the run begins with: a safetensors file, or a directory of them as `longtrain export` and Hugging Face write it.
    Drawn with `seed` when not given. Example: exported/llama."""

    threads: int | None = None
    """CPU threads; null for PyTorch's own choice. Losses repeat bit for bit at the same number only. Example: 2."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup_steps", 0), ("seed", 0)):
            at_least(f"train.{name}", getattr(self, name), least)
        for name in ("tokens_per_update", "validate_every", "validation_tokens", "decay_steps", "threads"):
            if getattr(self, name) is not None:
                at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("lr", "eps"):
            above_zero(f"train.{name}", getattr(self, name))
        for name in ("grad_clip", "filter_lr"):
            if getattr(self, name) is not None:
                above_zero(f"train.{name}", getattr(self, name))
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"train.betas: must be from 0 to below 1, found {beta:g}; 0.9 and 0.95 are usual")
        between("train.min_lr_ratio", self.min_lr_ratio, 0, 1)
        between("train.weight_decay", self.weight_decay, 0, 10)
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f"train.decay_steps: has no effect with schedule: {self.schedule}; set schedule: wsd, or remove it")
        if self.decay_steps is not None and self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"train.decay_steps: {self.decay_steps} and {self.warmup_steps} of warm-up are more than the {self.steps} steps; lower it"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"train.warmup_steps: {self.warmup_steps} leaves none of the {self.steps} steps after the warm-up; "
                "lower it, or raise train.steps"
            )
        starts = [stage.from_step for stage in self.length_schedule]
        for index, stage in enumerate(self.length_schedule):
            at_least(f"train.length_schedule[{index}].seq_len", stage.seq_len, 2)
            if stage.tokens_per_update is not None:
                at_least(f"train.length_schedule[{index}].tokens_per_update", stage.tokens_per_update, 1)
            if stage.rope_base is not None:
                above_zero(f"train.length_schedule[{index}].rope_base", stage.rope_base)
            above_zero(f"train.length_schedule[{index}].rope_scaling", stage.rope_scaling)
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
class SpikeConfig:
    """What happens when the loss of an update jumps: nothing, by default."""

    action: Literal["none", "skip", "stop"] = "none"
    """`skip`: the update is left out and the run goes on with the next sequences (a loss or gradient that is not finite too).
    `stop`: the run saves the state before the update and ends. `none`: only what is not finite ends the run."""

    threshold: float = 2.0
    """A spike is a loss above this many times the median of the last `window` losses."""

    window: int = 32
    """Losses that the median is taken of. Until there are as many, after the start and after each change of length, nothing is a spike."""

    def __post_init__(self) -> None:
        if not self.threshold > 1:
            raise ValueError(f"spike.threshold: must be above 1, found {self.threshold:g}; 2 is twice the usual loss")
        at_least("spike.window", self.window, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """What is saved so that a run can go on where it was: weights, AdamW's moments, random states, the position in the data."""

    every_steps: int | None = None
    """Updates between two checkpoints; null for none by this count. There is always one at the end, and when the run is interrupted.
    Example: 100."""

    every_minutes: float | None = 30.0
    """Minutes between two checkpoints; null for none by this count."""

    keep: int = 2
    """Checkpoints that are kept, the latest ones. With 2, a damaged one leaves another."""

    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written, from a copy in host memory (12 bytes a parameter, beyond the plan)."""

    resume: str = "auto"
    """`auto`: go on from the newest whole checkpoint in `output.dir`, if there is one. `never`: begin anew. Or the path of a checkpoint
    to go on from, or of a run, for its newest one. Example: auto."""

    def __post_init__(self) -> None:
        if self.every_steps is not None:
            at_least("checkpoint.every_steps", self.every_steps, 1)
        if self.every_minutes is not None:
            above_zero("checkpoint.every_minutes", self.every_minutes)
        at_least("checkpoint.keep", self.keep, 1)
        if not self.resume.strip():
            raise ValueError("checkpoint.resume: is empty; write auto, never, or the path of a checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """Where the metrics go besides `metrics.jsonl`, which is always written."""

    tensorboard: bool = False
    """Whether to write TensorBoard files into `tensorboard/` beside the metrics. Needs the extra longtrain[tensorboard]."""

    wandb: str | None = None
    """Project of Weights & Biases to report to; null for none. Needs the extra longtrain[wandb]. Example: long-context."""

    peak_tflops: float | None = None
    """Rate of the device in TFLOP/s that the MFU is a share of. Measured by a matrix product at the start when not given.
    Example: 989."""

    def __post_init__(self) -> None:
        if self.peak_tflops is not None:
            above_zero("metrics.peak_tflops", self.peak_tflops)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """Where the run writes."""

    dir: str
    """Directory for weights, metrics, plot and the resolved configuration; made when missing. Example: out/first."""

    overwrite: bool = False
    """Whether a finished run that stands in `dir` may be replaced; refused otherwise. An unfinished one is taken up again unless
    `checkpoint.resume` says never."""

    def __post_init__(self) -> None:
        if not self.dir.strip():
            raise ValueError("output.dir: is empty; name a directory, such as runs/first")
