"""The model that a configuration describes, longtrain's own or one of transformers, and the rotary positions that each stage gives it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from longtrain.config import Config, Locations
from longtrain.config.hf import HfModelConfig
from longtrain.config.schema import LengthStage
from longtrain.nn import LanguageModel
from longtrain.nn.rotary import RotaryEmbedding


def build_model(
    config: Config, where: Locations, *, read_weights: bool = True
) -> tuple[nn.Module, Callable[[LengthStage], None], tuple[str, ...]]:
    """The model on the CPU with its first weights, what sets its rotary positions, and notes on it; `read_weights` of `model.hf`."""
    if not isinstance(config.model, HfModelConfig):
        model = LanguageModel(config.model)
        return model, partial(set_rotary, model), ()
    from longtrain.train import pretrained  # for transformers, an extra

    built = pretrained.build(config.model, config.data.seq_len, getattr(torch, config.train.dtype), where, read_weights=read_weights)

    def set_stage(stage: LengthStage) -> None:
        try:
            built.rope.set(built.model, stage.rope)
        except ValueError as error:
            raise where.error("train.length_schedule", f"rope: {error}") from None

    for stage in config.stages():
        set_stage(stage)
    return built.model, set_stage, built.notes


def set_rotary(model: LanguageModel, stage: LengthStage) -> None:
    """Give every rotary embedding the base and the scaling of a stage."""
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            module.base, module.scaling = stage.rope_base, stage.rope_scaling
