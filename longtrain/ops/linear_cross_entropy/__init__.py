"""Cross entropy of `input @ weight.T` against target tokens, without holding the logits.

Read `reference.py` for what is computed and `chunked.py` for how.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtrain.ops.linear_cross_entropy import chunked, reference, torch_core
from longtrain.ops.linear_cross_entropy.call import Call, LossOptions, check_settings, check_shapes, check_targets, wide_dtype
from longtrain.ops.linear_cross_entropy.chunked import ChunkLoss, chunk_loss_and_grad, default_chunk_tokens, footprint_bytes, workspace

__all__ = ["ChunkLoss", "LossOptions", "check_settings", "check_targets", "chunk_loss_and_grad", "default_chunk_tokens", "explain",
           "footprint_bytes", "linear_cross_entropy", "loss_scale", "workspace"]

# In order of preference of backend="auto". Ours is first on measurement: see chunked.py.
BACKENDS = {"chunked": chunked, "torch": torch_core, "reference": reference}


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    token_weights: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of a linear map, chunk by chunk.

        loss = linear_cross_entropy(hidden_BTE, lm_head.weight, labels_BT)

    input: [..., E]. weight: [V, E], input's dtype (under autocast both are converted as F.linear would). bias: [V].
    target: [...], int64, `ignore_index` for tokens without a loss.
    reduction: "mean" divides the sum by `normalizer`, by default the number of valid tokens of this call, whatever their weights;
    over micro-batches and ranks pass the global count. "sum" divides by nothing. "none" returns each token's loss, [...], 0 where
    ignored. Without any valid token, loss and gradients are 0.
    token_weights: [...], multiply each token's loss; data, not differentiable.
    softcap, z_loss, label_smoothing: see `LossOptions`.
    chunk_tokens: tokens whose logits exist at a time; None takes `default_chunk_tokens`.
    backend: "auto", or one of "chunked", "torch", "reference".

    Returns float32 (float64 for float64 input). Sums make gradients in the forward: a second backward through the same loss
    raises RuntimeError, higher derivatives too.

    Raises ValueError for shapes, dtypes and options that do not fit, for a target outside the vocabulary (position and value named),
    and for a backend that cannot serve the call (with its reason).
    """
    check_shapes(input, weight, target, bias)
    call = _call(
        input, weight, target, bias=bias, ignore_index=ignore_index, reduction=reduction, normalizer=normalizer,
        token_weights=token_weights,
        softcap=softcap, z_loss=z_loss, label_smoothing=label_smoothing, chunk_tokens=chunk_tokens,
    )
    check_targets(target, weight.shape[0], ignore_index)
    with torch.autocast(input.device.type, enabled=False):
        loss = BACKENDS[_choose(call, backend)].run(call)
    return loss.view(target.shape) if reduction == "none" else loss


def explain(input: Tensor, weight: Tensor, target: Tensor, **options) -> dict[str, str | None]:
    """Each backend, in order of preference, and why it does not serve this call (None: it could). `options`: the others of
    `linear_cross_entropy`."""
    call = _call(input, weight, target, **options)
    return {name: module.refuse(call) for name, module in BACKENDS.items()}


def _choose(call: Call, backend: str) -> str:
    if backend == "auto":
        return next(name for name, module in BACKENDS.items() if module.refuse(call) is None)
    if backend not in BACKENDS:
        raise ValueError(f"linear_cross_entropy: backend must be auto or one of {', '.join(BACKENDS)}, not {backend!r}")
    reason = BACKENDS[backend].refuse(call)
    if reason is not None:
        raise ValueError(f"linear_cross_entropy: backend {backend!r} cannot serve this call: {reason}; backend='auto' takes one that can")
    return backend


def _call(
    input, weight, target, *, bias=None, ignore_index=-100, reduction="mean", normalizer=None, token_weights=None, softcap=None,
    z_loss=0.0, label_smoothing=0.0, chunk_tokens=None,
) -> Call:
    check_settings(target, token_weights, reduction, normalizer)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"linear_cross_entropy: chunk_tokens must be at least 1, not {chunk_tokens}")
    options = LossOptions(ignore_index=ignore_index, softcap=softcap, z_loss=z_loss, label_smoothing=label_smoothing)
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        input, weight = input.to(dtype), weight.to(dtype)
    wide = wide_dtype(input.dtype)
    target_N = target.reshape(-1)
    return Call(
        input_NE=input.reshape(-1, input.shape[-1]), weight_VE=weight, target_N=target_N, bias_V=bias,
        token_weights_N=None if token_weights is None else token_weights.reshape(-1).to(wide),
        scale=None if reduction == "none" else loss_scale(reduction, normalizer, target_N, ignore_index, wide),
        options=options, chunk_tokens=chunk_tokens)


def loss_scale(reduction: str, normalizer: float | Tensor | None, target_N: Tensor, ignore_index: int, wide: torch.dtype) -> Tensor:
    """1 / normalizer, and 0 where there is no valid token, so that nothing divided by nothing is 0."""
    if reduction == "sum":
        return torch.ones((), dtype=wide, device=target_N.device)
    valid = (target_N != ignore_index).sum()
    if normalizer is None:
        normalizer = valid
    elif isinstance(normalizer, Tensor):
        if normalizer.dim() != 0 or normalizer.requires_grad:
            raise ValueError("linear_cross_entropy: a tensor normalizer must be 0-d and without gradient, "
                             f"not {list(normalizer.shape)}, requires_grad={normalizer.requires_grad}")
        normalizer = normalizer.to(target_N.device)
    elif not normalizer > 0 and not (normalizer == 0 and valid == 0):
        raise ValueError(f"linear_cross_entropy: normalizer is {normalizer!r} and {int(valid)} tokens are valid; "
                         "it must be positive (the count of valid tokens over all micro-batches and ranks)")
    return torch.where(valid == 0, 0.0, torch.ones((), dtype=wide, device=target_N.device) / normalizer)
