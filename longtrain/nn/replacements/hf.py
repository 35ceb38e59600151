"""Parts of transformers models, one by one and whatever their family: attention on longtrain's kernels, an MLP by chunks of tokens.

Each is a module of the class it was, under the name it had, sharing parameters, submodules and so its state_dict keys.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

PROOF_TOKENS, PROOF_CHUNK, PROOF_BOUND = 13, 5, 1e-10
"""Relative norm, in float64: matrix products of other shapes round at 1e-15."""


def hf_attention(attention: nn.Module) -> nn.Module:
    """An attention module of transformers on longtrain's attention, while others keep the model's `attn_implementation`.

        layer.self_attn = longtrain.nn.hf_attention(layer.self_attn)

    Mask tensors, which such models make for windows, padding and packed documents, are read and refused where they are something else;
    with attn_implementation="longtrain" for the whole model none are made. Raises ValueError for a module that does not call
    transformers' `AttentionInterface`.
    """
    import longtrain.hf  # noqa: F401  (an extra; it registers "longtrain")

    forward = type(attention).forward
    if not hasattr(getattr(attention, "config", None), "_attn_implementation") or (
        "ALL_ATTENTION_FUNCTIONS" not in inspect.unwrap(forward).__code__.co_names
    ):
        raise ValueError(
            f"{type(attention).__name__} does not choose its attention by transformers' AttentionInterface; give the attention "
            "module of a family that does (docs/hf_families.md)"
        )
    replaced = copy.copy(attention)
    replaced.config = copy.copy(attention.config)
    replaced.config._attn_implementation = "longtrain"
    replaced.forward = partial(_with_mask_as_data, forward.__get__(replaced))
    return replaced


def _with_mask_as_data(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from longtrain.hf.mask import read_mask

    bound = inspect.signature(forward).bind(*args, **kwargs)
    if isinstance(mask := bound.arguments.get("attention_mask"), Tensor):
        bound.arguments["attention_mask"] = read_mask(mask)
    return forward(*bound.args, **bound.kwargs)


def by_chunks(module: nn.Module, chunk_tokens: int, features: int | None = None) -> nn.Module:
    """A token-local module ``[B, T, E] -> [B, T, ...]`` (an MLP, gated or not, fused or not) that holds one chunk's activations at a time.

        layer.mlp = longtrain.nn.by_chunks(layer.mlp, 4096)

    The backward pass runs each chunk again; parameters receive their gradients once, summed in float32 or wider. `features` is E, by
    default the `in_features` of the first linear layer. Raises ValueError where the module is not token-local: proved on a tiny input.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, found {chunk_tokens}")
    if features is None:
        features = next((m.in_features for m in module.modules() if hasattr(m, "in_features")), None)
    if features is None:
        raise ValueError(f"{type(module).__name__} has no linear layer that tells its width: give features=")
    if why := _not_token_local(module, features):
        raise ValueError(f"{type(module).__name__} cannot run by chunks: {why}")
    # Two shallow copies share parameters and submodules: one runs a chunk, the other stands in the model and has the hooks.
    inner, replaced = copy.copy(module), copy.copy(module)
    vars(inner).update({name: type(value)() for name, value in vars(inner).items() if name.endswith("_hooks")})
    replaced.forward = partial(_run, inner, chunk_tokens)
    return replaced


def _run(module: nn.Module, chunk_tokens: int, x_BTE: Tensor) -> Tensor:
    if x_BTE.ndim != 3:
        raise ValueError(f"a module that runs by chunks takes [B, T, E], found shape {list(x_BTE.shape)}")
    names, parameters = zip(*module.named_parameters(), strict=True) if any(True for _ in module.parameters()) else ((), ())
    return _ByChunks.apply(partial(_call, module, names), chunk_tokens, x_BTE, *parameters)


def _call(module: nn.Module, names: Sequence[str], parameters: Sequence[Tensor], x_BCE: Tensor) -> Tensor:
    return functional_call(module, dict(zip(names, parameters, strict=True)), (x_BCE,))


class _ByChunks(torch.autograd.Function):
    """(x, parameters) -> module(x), chunk by chunk without a graph; the backward makes one chunk's graph at a time."""

    @staticmethod
    def forward(ctx, call: Callable[..., Tensor], chunk: int, x_BTE: Tensor, *parameters: Tensor) -> Tensor:
        kind = x_BTE.device.type
        ctx.autocast = dict(
            device_type=kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )
        ctx.call, ctx.chunk = call, chunk
        ctx.save_for_backward(x_BTE, *parameters)
        return torch.cat([call(parameters, part.contiguous()) for part in x_BTE.split(chunk, dim=1)], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF: Tensor):
        x_BTE, *parameters = ctx.saved_tensors
        want_x, *wanted = ctx.needs_input_grad[2:]
        aliases = [p.detach().requires_grad_(want) for p, want in zip(parameters, wanted, strict=True)]
        sums = [
            torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) if w else None
            for p, w in zip(parameters, wanted, strict=True)
        ]
        dx_parts = []
        for x_BCE, dy_BCF in zip(x_BTE.split(ctx.chunk, dim=1), dy_BTF.split(ctx.chunk, dim=1), strict=True):
            x_BCE = x_BCE.detach().contiguous().requires_grad_(want_x)
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                y_BCF = ctx.call(aliases, x_BCE)
            leaves = [t for t in (x_BCE, *aliases) if t.requires_grad]
            grads = iter(torch.autograd.grad(y_BCF, leaves, dy_BCF, allow_unused=True))
            if want_x:
                dx = next(grads)
                dx_parts.append(torch.zeros_like(x_BCE) if dx is None else dx)
            for total in sums:
                if total is not None and (grad := next(grads)) is not None:
                    total += grad
        return None, None, torch.cat(dx_parts, dim=1) if want_x else None, *sums


def _not_token_local(module: nn.Module, features: int) -> str | None:
    """Why a module in chunks is not the module on the whole, or None: run both ways on a copy in float64, in evaluation and training."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    copied = copy.deepcopy(module).double()
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        x_BTE = torch.randn(1, PROOF_TOKENS, features, dtype=torch.float64, device=device)
        buffers = [b.clone() for b in copied.buffers()]
        for training in (False, module.training):
            copied.train(training)
            try:
                whole, again = copied(x_BTE), copied(x_BTE)
                if not isinstance(whole, Tensor) or whole.shape[:2] != x_BTE.shape[:2]:
                    given = list(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
                    return f"it gives out {given} for [1, {PROOF_TOKENS}, E]"
                chunked = torch.cat([copied(part.contiguous()) for part in x_BTE.split(PROOF_CHUNK, dim=1)], dim=1)
            except Exception as error:  # whatever it is, it is the reason: reported by name, never dropped
                return f"{type(error).__name__}: {error}"
            if any(not torch.equal(a, b) for a, b in zip(buffers, copied.buffers(), strict=True)):
                return "it changes its buffers in forward, and each chunk runs twice"
            if not torch.equal(whole, again):
                return "it draws random numbers (dropout) in training, and each chunk runs twice: set its dropout to 0"
            error = float((whole - chunked).norm() / whole.norm())
            if not error <= PROOF_BOUND:
                return f"its output in chunks of {PROOF_CHUNK} differs from the whole by {error:.1e}: it looks across tokens"
    return None
