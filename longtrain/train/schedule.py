"""The learning rate of each update."""

from __future__ import annotations

import math

from longtrain.config.schema import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up to `lr`, reached after `warmup_steps` updates; then half a cosine down to `min_lr_ratio * lr` at the last update
    (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, one cycle), or constant. `step` counts from 0.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    lowest = config.min_lr_ratio * config.lr
    return lowest + (config.lr - lowest) * 0.5 * (1 + math.cos(math.pi * progress))
