"""Ways of running one training step of the same model, from plain autograd to streamed; what bench_step.py and gpu_check.py compare.

    plain                 everything kept, all logits
    checkpoint            torch.utils.checkpoint around every layer, all logits
    checkpoint+chunked    the same with chunked cross entropy
    selective+chunked     checkpointing that keeps the attention outputs (the rival in time), chunked cross entropy
    streamed              longtrain.apply; "streamed:key=value,..." sets fields of its Plan
    streamed+disk         the same with all that it stores between forward and backward on disk
    hf-plain, hf-checkpoint   transformers' own LlamaForCausalLM with the same weights (needs transformers)

The baselines are longtrain's model run by plain torch: their attention is F.scaled_dot_product_attention, torch's flash path.
Layers with a window would leave that path (a mask costs T x T), so those, and only those, take longtrain's attention everywhere.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import longtrain as lt
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.ops.linear_cross_entropy import linear_cross_entropy
from longtrain.planner import measure_model
from longtrain.planner.tiers import tier_use
from longtrain.span import Layout

METHODS = ("plain", "checkpoint", "checkpoint+chunked", "selective+chunked", "streamed", "streamed+disk", "hf-plain", "hf-checkpoint")

Step = Callable[[Tensor], Tensor]
"""Token ids [B, T] to the loss, a graph behind it."""


def prepare(
    method: str, config: ModelConfig, plan: lt.Plan, *, device: str, dtype: torch.dtype, seed: int = 0, disk: str = ".", tokens: int = 0
) -> tuple[nn.Module, Step]:
    """A model and the function that runs its forward by `method`. Weights depend on `seed` alone. `streamed+disk` writes to the
    directory `disk`, with room for steps of `tokens`.

    Raises ValueError for an unknown method or plan field, ImportError naming the extra where transformers is missing.
    """
    name, _, settings = method.partition(":")
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    torch.manual_seed(seed)
    model = LanguageModel(config).to(device, dtype)
    if name.startswith("hf-"):
        return _transformers_step(model, config, name == "hf-checkpoint", device, dtype)
    if name in ("streamed", "streamed+disk"):
        plan = dataclasses.replace(plan, **_plan_fields(settings))
        lt.apply(model, on_disk(model, plan, disk, tokens) if name == "streamed+disk" else plan)
        return model, lambda ids: model(input_ids=ids, labels=ids).loss
    if settings:
        raise ValueError(f"only streamed steps take settings, not {method!r}")
    return model, partial(_baseline_step, model, name)


def on_disk(model: nn.Module, plan: lt.Plan, path: str, tokens: int, staging_bytes: int = 32 << 20) -> lt.Plan:
    """`plan` with everything that it stores on disk, and with room there for what the planner says a step needs, and a tenth more."""
    split = lt.Split()

    def of(budget: int) -> lt.Plan:
        disk = lt.DiskSettings(path=path, budget=budget)
        offload = lt.Offload(inputs=split, gradients=split, outputs=split, kv=split, disk=disk, staging_bytes=staging_bytes)
        return dataclasses.replace(plan, offload=offload)

    held = tier_use(measure_model(model), of(1), tokens)["disk"].held
    return of(held + held // 10 + (1 << 20))


def _plan_fields(settings: str) -> dict:
    fields = {}
    for item in filter(None, settings.split(",")):
        key, _, value = item.partition("=")
        if key not in {f.name for f in dataclasses.fields(lt.Plan)}:
            raise ValueError(f"streamed: {key!r} is no field of Plan: {', '.join(f.name for f in dataclasses.fields(lt.Plan))}")
        try:
            fields[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[key] = value
    return fields


def _baseline_step(model: LanguageModel, name: str, ids_BT: Tensor) -> Tensor:
    documents = Layout.make(ids_BT.shape[1])
    positions_BT = documents.positions(ids_BT.device)[None].expand_as(ids_BT)
    run = {
        "plain": lambda function, x: function(x),
        "selective+chunked": partial(
            checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, keep_attention)
        ),
    }.get(name, partial(checkpoint, use_reentrant=False))
    x_BTE = model.model.embed_tokens(ids_BT)
    for index, layer in enumerate(model.model.layers):
        mix = None if model.config.layer_window(index) is not None else sdpa
        x_BTE = run(partial(layer, positions_BT=positions_BT, documents=documents, mix=mix), x_BTE)
    x_BTE = model.model.norm(x_BTE)
    targets_BT = documents.next_token_targets(ids_BT)
    if name.endswith("+chunked"):
        return linear_cross_entropy(x_BTE, model.lm_head.weight, targets_BT)
    logits_NV = model.lm_head(x_BTE).flatten(0, 1)
    return F.cross_entropy(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), targets_BT.flatten())


def sdpa(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
    """Full causal attention by torch, on its flash path."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


_ATTENTION_OPS = {
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_flash_attention_forward",
    )
}


def keep_attention(context, op, *args, **kwargs) -> CheckpointPolicy:
    longtrain_attention = op.namespace == "longtrain" and "attention" in op.name() and "backward" not in op.name()
    return CheckpointPolicy.MUST_SAVE if op in _ATTENTION_OPS or longtrain_attention else CheckpointPolicy.PREFER_RECOMPUTE


def _transformers_step(
    ours: LanguageModel, config: ModelConfig, checkpointing: bool, device: str, dtype: torch.dtype
) -> tuple[nn.Module, Step]:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ImportError("comparing with transformers needs it: pip install 'longtrain[hf]'") from error
    if config.window is not None or config.rope_fraction != 1:
        raise ValueError("Llama has neither windows nor partial rotary embeddings: compare a shape without them")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
        head_dim=config.resolved_head_dim, rms_norm_eps=config.norm_eps, max_position_embeddings=1 << 20, use_cache=False,
        tie_word_embeddings=config.tie_embeddings, attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base})).to(device, dtype)
    model.load_state_dict(ours.state_dict())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss
