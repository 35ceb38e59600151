"""Log-probability of each target and entropy of each distribution, for a chunk of tokens of a linear map, and their gradient.

    z = softcap * tanh(s / softcap) / temperature          s = W x + b          p = softmax(z)
    logp = z_target - lse          H = lse - sum_v p_v z_v
    dlogp/dz = onehot(target) - p          dH/dz_v = -p_v (z_v - lse + H)          dz/ds = (1 - tanh(s / softcap)^2) / temperature

Axes: C tokens of a chunk, E width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtrain.ops.linear_cross_entropy.call import wide_dtype
from longtrain.ops.linear_cross_entropy.chunked import _gradients, _logits


def chunk_logprobs(
    x_CE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, target_C: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) ``[C]``, float32 or wider. Targets lie in the vocabulary. Without autograd."""
    z_CV, _ = _scores(x_CE, weight_VE, bias_V, temperature, softcap)
    lse_C = z_CV.logsumexp(-1)
    logp_C = z_CV.gather(-1, target_C[:, None])[:, 0] - lse_C
    return logp_C, lse_C - _expectation(z_CV, lse_C)


def chunk_logprobs_backward(
    dlogp_C: Tensor,
    dentropy_C: Tensor,
    x_CE: Tensor,
    weight_VE: Tensor,
    bias_V: Tensor | None,
    target_C: Tensor,
    temperature: float,
    softcap: float | None,
    *,
    want_dx: bool,
    dweight_VE: Tensor | None,
    dbias_V: Tensor | None,
) -> Tensor | None:
    """Gradient of ``sum(dlogp logp + dentropy H)`` by x; adds into the wide accumulators that are given. Computes the scores again."""
    z_CV, tanh_CV = _scores(x_CE, weight_VE, bias_V, temperature, softcap)
    lse_C = z_CV.logsumexp(-1)
    entropy_C = lse_C - _expectation(z_CV, lse_C)
    logp_CV = z_CV.sub_(lse_C[:, None]).clamp_(min=-1e4)  # p is 0 there in any dtype, and 0 times -inf would not be
    # dz_v = dlogp (onehot - p_v) - dH p_v (logp_v + H)
    g_CV = logp_CV.add(entropy_C[:, None]).mul_(-dentropy_C[:, None]).sub_(dlogp_C[:, None]).mul_(logp_CV.exp_())
    g_CV.scatter_add_(-1, target_C[:, None], dlogp_C[:, None].to(g_CV.dtype))
    if tanh_CV is not None:
        g_CV.mul_(tanh_CV.square_().neg_().add_(1))
    return _gradients(g_CV, torch.full_like(lse_C, 1 / temperature), x_CE, weight_VE, want_dx, dweight_VE, dbias_V)


def _scores(
    x_CE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """z, and the tanh of the softcap."""
    z_CV = torch.empty(x_CE.shape[0], weight_VE.shape[0], dtype=wide_dtype(x_CE.dtype), device=x_CE.device)
    _logits(x_CE, weight_VE, z_CV)
    if bias_V is not None:
        z_CV.add_(bias_V)
    tanh_CV = None
    if softcap is not None:
        tanh_CV = torch.tanh(z_CV.div_(softcap))
        torch.mul(tanh_CV, softcap, out=z_CV)
    return z_CV.div_(temperature), tanh_CV


def _expectation(z_CV: Tensor, lse_C: Tensor) -> Tensor:
    """sum_v p_v z_v, where -inf scores count as nothing."""
    p_CV = torch.exp(z_CV - lse_C[:, None])
    return torch.where(p_CV == 0, 0, p_CV * z_CV).sum(-1)
