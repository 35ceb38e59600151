"""Objectives on streamed log-probabilities against their formulas on full logits, losses and gradients, in float32."""

import pytest
import torch
import torch.nn.functional as F

import longtrain as lt
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.objectives import dpo_loss, group_advantages, grpo_loss, sequence_logprobs

VOCAB, TOKENS = 41, 19
CLOSE = 1e-6


def policy(seed=0):
    torch.manual_seed(seed)
    return LanguageModel(ModelConfig(vocab_size=VOCAB, num_layers=2, hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2))


def full(model, ids):
    logp = model(ids).logits.log_softmax(-1)
    return F.pad(logp[:, :-1].gather(-1, ids[:, 1:, None])[..., 0], (1, 0))


def streamed(model, ids):
    return torch.cat([lt.token_logprobs(model, row[None], chunk_tokens=5)[0] for row in ids])


def outcome(loss, model):
    model.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def compare(objective):
    """`objective(model, reference, logprobs)`, on full logits and streamed."""
    model, reference = policy(), policy(1)
    expected = outcome(objective(model, reference, full), model)
    for each in (model, reference):
        lt.apply(each, lt.Plan(chunk_tokens=6))
    found = outcome(objective(model, reference, streamed), model)
    (loss, grad), (expected_loss, expected_grad) = found, expected
    assert abs(loss - expected_loss) <= CLOSE  # a mean of terms of order one that may cancel
    assert (grad - expected_grad).norm() <= CLOSE * expected_grad.norm()


ids = torch.randint(VOCAB, (4, TOKENS), generator=torch.Generator().manual_seed(2))
mask = (torch.arange(TOKENS) >= torch.tensor([5, 5, 7, 7])[:, None]).float()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo(smoothing):
    def objective(model, reference, logprobs):
        ours = sequence_logprobs(logprobs(model, ids), mask)
        with torch.no_grad():
            theirs = sequence_logprobs(logprobs(reference, ids), mask)
        if logprobs is full:  # written out
            margin = 0.3 * ((ours[:2] - theirs[:2]) - (ours[2:] - theirs[2:]))
            return sum(-(1 - smoothing) * torch.log(torch.sigmoid(m)) - smoothing * torch.log(1 - torch.sigmoid(m)) for m in margin) / 2
        return dpo_loss(ours[:2], ours[2:], theirs[:2], theirs[2:], beta=0.3, label_smoothing=smoothing)

    compare(objective)


@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
@pytest.mark.parametrize("normalizer", [None, 123.0])
def test_grpo(kl_coef, normalizer):
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.2, 0.7]), 2)
    old = torch.randn(4, TOKENS, generator=torch.Generator().manual_seed(1)) * 0.3

    def objective(model, reference, logprobs):
        logp = logprobs(model, ids)
        with torch.no_grad():
            ref, before = logprobs(reference, ids), logp + old  # ratios on both sides of the clip
        if logprobs is full:
            total = 0.0
            for b in range(4):
                for t in range(TOKENS):
                    if mask[b, t]:
                        ratio = torch.exp(logp[b, t] - before[b, t])
                        bounded = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.3))
                        gap = ref[b, t] - logp[b, t]
                        total = total - min(ratio * advantages[b], bounded * advantages[b]) + kl_coef * (torch.exp(gap) - gap - 1)
            return total / (mask.sum() if normalizer is None else normalizer)
        return grpo_loss(logp, before, advantages, mask, clip=(0.2, 0.3), ref_logp_BT=ref, kl_coef=kl_coef, normalizer=normalizer)

    compare(objective)


def test_bad_input():
    with pytest.raises(ValueError, match="needs ref_logp"):
        grpo_loss(mask, mask, mask[:, 0], mask, kl_coef=0.1)
    with pytest.raises(ValueError, match="do not fill groups of 3"):
        group_advantages(torch.ones(4), 3)
