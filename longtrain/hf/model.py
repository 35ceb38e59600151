"""A whole transformers model: attention switched to longtrain's, layers found and made streamable, the head replaced, wrong calls
refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from longtrain.hf.head import lazy_forward, streamed_loss
from longtrain.hf.mask import OfWhole
from longtrain.hf.router import give_out, routers_of
from longtrain.hf.trace import Found, find_layers
from longtrain.plan import Plan
from longtrain.sharded import sharded_parameter, units


@dataclass(frozen=True, slots=True)
class Adapted:
    """What was found in a model and done to it."""

    runs: list[list[Found]]
    head: tuple[str, str] | None
    """Name of the output projection, and why it was left as it is ("" where it was not)."""


def pretrained_of(model: nn.Module) -> PreTrainedModel | None:
    """The transformers model that `model` is or wraps (as PEFT does)."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def adapt(model: nn.Module, plan: Plan, tokens: int, undo: list[Callable[[], Any]]) -> Adapted:
    """Prepare `model` for streaming. What was changed is put on `undo`, also when this raises.

    Raises ValueError, naming the remedy, for a model that cannot use longtrain's attention, or cannot be run on `tokens` tokens.
    """
    pretrained = pretrained_of(model)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError("gradient checkpointing is on: streaming recomputes by itself, and the two would do it twice; call "
                         "model.gradient_checkpointing_disable() first")
    if (name := sharded_parameter(model)) and not units(model):
        raise ValueError(f"{name} is sharded, and not by fully_shard: tensor-parallel modules cannot be streamed yet")
    _use_attention(pretrained, undo)
    _turn_off_cache(pretrained, undo)
    with torch.random.fork_rng(devices={p.device for p in model.parameters() if p.device.type == "cuda"}):
        runs = find_layers(model, partial(_run, pretrained), tokens)
    for unit in units(model):  # the root keeps its parameters whole behind a forward pass
        unit.reshard()
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for run in runs:
        layers = [found.adapted for found in run if found.adapted is not None]
        for layer in layers:
            layer.routers = routers_of(inner, layer.layer)
            undo.append(layer.uninstall)
            layer.install()
        decoder = [module for module in inner if any(run[0].module is part for part in module.modules())][-1]
        undo.append(decoder.register_forward_hook(partial(give_out, layers), with_kwargs=True).remove)
    # Routers outside of streamed layers would be collected by nobody.
    routers = sum(len(found.adapted.routers) for run in runs for found in run if found.adapted is not None)
    balanced = plan.segment_layers == 1 and 0 < routers == len(routers_of(inner, model))
    for module in inner:
        undo.append(module.register_forward_pre_hook(partial(_check_call, plan, balanced), with_kwargs=True).remove)
    return Adapted(runs, _replace_head(model, pretrained, plan, undo))


def _use_attention(pretrained: PreTrainedModel, undo: list[Callable[[], Any]]) -> None:
    before = {id(c): (c, c._attn_implementation) for m in pretrained.modules() if (c := getattr(m, "config", None)) is not None
              and hasattr(c, "_attn_implementation_internal")}
    undo.append(lambda: [setattr(config, "_attn_implementation_internal", name) for config, name in before.values()])
    pretrained.set_attn_implementation("longtrain")
    if pretrained.config._attn_implementation != "longtrain":
        raise ValueError(f"{type(pretrained).__name__} does not call attention through transformers' AttentionInterface, so its layers "
                         "cannot be streamed; use a family that does (see docs/hf_families.md)")


def _turn_off_cache(pretrained: PreTrainedModel, undo: list[Callable[[], Any]]) -> None:
    """Training calls make no KV cache unless they ask for one; `generate` asks."""
    configs = {id(m.config): m.config for m in pretrained.modules() if isinstance(m, PreTrainedModel)}
    for config in configs.values():
        if getattr(config, "use_cache", False):
            config.use_cache = False
            undo.append(partial(setattr, config, "use_cache", True))


def _run(pretrained: PreTrainedModel, tokens: int) -> None:
    embedding = pretrained.get_input_embeddings().weight
    if embedding.is_meta:
        raise ValueError("the model is on the meta device: give it memory (to_empty, then load or initialise) before lt.apply")
    ids = torch.arange(tokens, device=embedding.device)[None] % embedding.shape[0]
    try:
        pretrained(input_ids=ids, use_cache=False)
    except Exception as error:
        raise ValueError(
            f'{type(pretrained).__name__} cannot be run on {tokens} tokens with attn_implementation="longtrain" '
            f"({type(error).__name__}: {error}), so it cannot be streamed"
        ) from error


def _replace_head(model: nn.Module, pretrained: PreTrainedModel, plan: Plan, undo: list[Callable[[], Any]]) -> tuple[str, str] | None:
    head = pretrained.get_output_embeddings()
    if head is None:
        return None
    name = next(name for name, module in model.named_modules() if module is head)
    if head in units(model):
        return name, "it is a unit of fully_shard of its own, and its weight is gone when the loss needs it; leave it to the root's unit"
    if type(head) is not nn.Linear:
        return name, f"it is a {type(head).__name__}, and only nn.Linear is streamed"
    loss = pretrained.loss_function
    if loss is not ForCausalLMLoss:
        return name, f"the model's loss_function is {getattr(loss, '__name__', loss)}, and only ForCausalLMLoss is streamed"
    had_own_loss, had_own_forward = "_loss_function" in pretrained.__dict__, head.__dict__.get("forward")

    def restore() -> None:
        if had_own_loss:
            pretrained.loss_function = loss
        else:
            del pretrained._loss_function
        if had_own_forward is None:
            del head.forward
        else:
            head.forward = had_own_forward

    undo.append(restore)
    head.forward = partial(lazy_forward, head, head.forward, plan.loss_chunk_tokens)
    pretrained.loss_function = partial(streamed_loss, loss)
    return name, ""


def _check_call(
    plan: Plan, balanced: bool, module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Before every call of the model: raise ValueError for what streaming would get wrong, and say `output_router_logits` aloud."""
    asked = lambda name: kwargs[name] if kwargs.get(name) is not None else getattr(module.config, name, None)
    if asked("output_attentions"):
        raise ValueError("output_attentions=True: a streamed layer never holds its attention probabilities; leave it off")
    if asked("output_hidden_states") and plan.boundaries == "stream":
        raise ValueError('output_hidden_states=True: hidden states between layers are streamed away; use Plan(boundaries="tensor")')
    if asked("output_hidden_states") and plan.segment_layers > 1:
        raise ValueError("output_hidden_states=True: there are none between the layers of a segment; use Plan(segment_layers=1)")
    if torch.is_grad_enabled() and (kwargs.get("use_cache") or kwargs.get("past_key_values") is not None):
        raise ValueError("a KV cache in training: pass use_cache=False and no past_key_values, or call under torch.no_grad()")
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    given = isinstance(mask, Tensor) and not isinstance(mask, OfWhole) and mask.ndim == 2
    if given and isinstance(positions, Tensor) and positions.shape[-1] == mask.shape[-1]:
        joined = mask[:, 1:].bool() & mask[:, :-1].bool()
        if positions.ndim == 2 and bool((joined & (positions.diff(dim=-1) != 1)).any()):
            raise ValueError("position_ids restart inside a row and attention_mask is given: transformers then lets packed documents see "
                             "each other; leave attention_mask out for packed rows")
    if not asked("output_router_logits"):
        return None
    if not balanced:
        raise ValueError(
            "output_router_logits=True: router logits are collected with Plan(segment_layers=1) from families that record them "
            "by router module; leave it off (router_aux_loss_coef has no effect without it)"
        )
    return args, {**kwargs, "output_router_logits": True}
