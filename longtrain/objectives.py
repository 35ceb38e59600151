"""Preference and RL objectives as functions of token log-probabilities, such as `longtrain.token_logprobs` gives: no logits anywhere.

All tensors are token-wise ``[B, T]``; `mask` is 1 where a token counts (a completion's tokens), 0 elsewhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_logprobs(logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """``[B]``: log-probability of each completion."""
    return (logp_BT * mask_BT).sum(-1)


def dpo_loss(
    chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """Direct preference optimisation (arXiv:2305.18290, equation 7), mean over pairs, of log-probabilities of whole completions.

        margin = beta ((chosen - ref_chosen) - (rejected - ref_rejected))
        loss = -(1 - e) log sigmoid(margin) - e log sigmoid(-margin)           e: label_smoothing (arXiv:2305.18290v3, appendix)
    """
    margin_B = beta * ((chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B))
    return -((1 - label_smoothing) * F.logsigmoid(margin_B) + label_smoothing * F.logsigmoid(-margin_B)).mean()


def group_advantages(rewards_B: Tensor, group: int, *, eps: float = 1e-4) -> Tensor:
    """``[B]``: each reward less its group's mean, over its group's deviation (GRPO, arXiv:2402.03300, section 4.1.2).

    Completions of one prompt stand together, `group` of them. Raises ValueError where they do not fill groups.
    """
    if group < 2 or rewards_B.numel() % group:
        raise ValueError(f"{rewards_B.numel()} rewards do not fill groups of {group}: at least 2 completions a prompt, all prompts alike")
    grouped = rewards_B.view(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + eps)).view(-1)


def grpo_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    ref_logp_BT: Tensor | None = None,
    kl_coef: float = 0.0,
    unbiased_kl: bool = False,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Group relative policy optimisation (arXiv:2402.03300, equations 3 and 4), over tokens.

        ratio = exp(logp - old_logp)          kl = exp(ref - logp) - (ref - logp) - 1
        loss = sum over mask of (-min(ratio A, clamp(ratio, 1 - clip[0], 1 + clip[1]) A) + kl_coef kl) / normalizer

    `unbiased_kl` multiplies kl by the ratio, which makes its gradient that of the reverse KL divergence (DeepSeek-V3.2, arXiv:2512.02556;
    what TRL does by default). `normalizer` is by default the number of tokens that count in this call; over micro-batches and ranks give
    the global number. Raises ValueError for `kl_coef` without `ref_logp_BT`.
    """
    if kl_coef and ref_logp_BT is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logp_BT, the reference model's log-probabilities")
    ratio = (logp_BT - old_logp_BT).exp()
    advantage = advantages_B[:, None]
    loss_BT = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage)
    if kl_coef:
        difference = ref_logp_BT - logp_BT
        kl_BT = difference.exp() - difference - 1
        loss_BT = loss_BT + kl_coef * (kl_BT * ratio if unbiased_kl else kl_BT)
    return (loss_BT * mask_BT).sum() / (mask_BT.sum() if normalizer is None else normalizer)
