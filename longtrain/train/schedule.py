"""What each update has of the schedules: its learning rate, its stage of the lengths."""

from __future__ import annotations

import math
from bisect import bisect_right

from longtrain.config import Config
from longtrain.config.run import LengthStage, TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up to `lr`, reached after `warmup_steps` updates; then by `schedule`, p from 0 to 1 at the last update:

    constant    1
    linear      1 - p
    cosine      (1 + cos(pi p)) / 2        (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, one cycle)
    wsd         1, then 1 - sqrt(p) over the last `decay_steps` updates    (Hägele et al. 2024, arXiv:2405.18392, eq. 1)

    each between `min_lr_ratio * lr` and `lr`. `step` counts from 0.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    falls_from = config.warmup_steps
    if config.schedule == "wsd":
        falls_from = max(falls_from, config.steps - 1 - (config.decay_steps or config.steps // 5))
    p = max(0, step - falls_from) / max(1, config.steps - 1 - falls_from)
    share = {"linear": 1 - p, "cosine": 0.5 * (1 + math.cos(math.pi * p)), "wsd": 1 - math.sqrt(p)}[config.schedule]
    lowest = config.min_lr_ratio * config.lr
    return lowest + (config.lr - lowest) * share


def stage_at(config: Config, step: int) -> LengthStage:
    """The stage of update `step` (from 0)."""
    stages = config.stages()
    return stages[bisect_right([s.from_step for s in stages], max(0, step)) - 1]


def remaining_tokens(config: Config, step: int) -> int:
    """Tokens of the updates from `step` on."""
    stages = config.stages()
    ends = [s.from_step for s in stages[1:]] + [config.train.steps]
    return sum(max(0, end - max(step, s.from_step)) * s.tokens_per_update for s, end in zip(stages, ends, strict=True))


def step_count(config: Config) -> int:
    """Forward and backward passes over ``data.seq_len`` tokens that the run's updates come to."""
    return max(1, -(-remaining_tokens(config, 0) // config.data.seq_len))
