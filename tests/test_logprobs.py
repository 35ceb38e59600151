"""Token log-probabilities and entropies against full logits and plain autograd, in float64."""

import pytest
import torch
from torch import nn

import longtrain as lt
from longtrain.nn import LanguageModel, ModelConfig, RMSNorm
from longtrain.span import IGNORE_INDEX, Layout
from longtrain.stream.logprobs import streamed_token_logprobs

TOKENS, WIDTH, VOCAB = 17, 6, 23
TOLERANCE = 1e-12
"""Relative norm. Sums of at most 400 terms, each rounded at 1e-16."""


def dense(hidden, norm, head, targets, temperature=1.0, softcap=None):
    z = head(norm(hidden))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = (z / temperature).log_softmax(-1)
    valid = targets != IGNORE_INDEX
    return logp.gather(-1, targets.where(valid, 0)[..., None])[..., 0] * valid, -(logp.exp() * logp).sum(-1) * valid


def assert_close(a, b, tolerance=TOLERANCE):
    assert (a - b).norm() <= tolerance * b.norm(), f"{float((a - b).norm() / b.norm()):.1e}"


@pytest.mark.parametrize("chunk", [1, 5, 34, 100])
@pytest.mark.parametrize(
    "options", [{}, dict(temperature=0.7), dict(temperature=1.3, softcap=2.0)], ids=["plain", "temperature", "softcap"]
)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(chunk, options, bias):
    norm, head = RMSNorm(WIDTH).double(), nn.Linear(WIDTH, VOCAB, bias=bias).double()
    nn.init.normal_(norm.weight)
    hidden = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(VOCAB, (2, TOKENS))
    targets[0, 3:7] = IGNORE_INDEX
    found = streamed_token_logprobs(hidden, norm, head, targets, **options, chunk_tokens=chunk)
    expected = dense(hidden, norm, head, targets, **options)
    cotangents = [torch.randn_like(t) for t in expected]
    leaves = [hidden, *norm.parameters(), *head.parameters()]
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
        assert (a[0, 3:7] == 0).all()
    for pick in ([0], [1], [0, 1]):
        grads, wanted = (torch.autograd.grad([t[i] for i in pick], leaves, [cotangents[i] for i in pick], retain_graph=True)
                         for t in (found, expected))
        for a, b in zip(grads, wanted, strict=True):
            assert_close(a, b)


def test_a_frozen_head_and_frozen_hidden_states():
    head, hidden = nn.Linear(WIDTH, VOCAB).double(), torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    targets = torch.randint(VOCAB, (1, TOKENS))
    for frozen in ("head", "hidden"):
        head.requires_grad_(frozen != "head")
        x = hidden.clone().requires_grad_(frozen != "hidden")
        logp, _ = streamed_token_logprobs(x, nn.Identity(), head, targets, chunk_tokens=5)
        logp.sum().backward()
        assert (x.grad is None) == (frozen == "hidden") and (head.weight.grad is None) == (frozen == "head")
        head.zero_grad()


def test_distributions_that_are_certain_have_no_entropy():
    """Scores of -inf and of 10^4 apart: 0 * inf must not appear."""
    head = nn.Linear(1, 3).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1e4], [0.0], [0.0]]))
        head.bias.copy_(torch.tensor([0.0, 0.0, -torch.inf]))
    hidden = torch.ones(1, 2, 1, dtype=torch.float64, requires_grad=True)
    logp, entropy = streamed_token_logprobs(hidden, nn.Identity(), head, torch.tensor([[0, 1]]))
    assert logp.tolist() == [[0.0, -1e4]] and entropy.tolist() == [[0.0, 0.0]]
    (logp.sum() + entropy.sum()).backward()
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("applied", [False, True])
def test_a_language_model_of_ours(applied):
    torch.manual_seed(0)
    model = LanguageModel(
        ModelConfig(vocab_size=VOCAB, num_layers=2, hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2)
    ).double()
    ids = torch.randint(VOCAB, (1, TOKENS))
    cu = [0, 6, 7, TOKENS]
    rows = [dense(model.model.norm(model.model(ids[:, a:b], Layout.make(b - a), None)), nn.Identity(), model.lm_head,
                  torch.cat([ids[:, a + 1 : b], torch.tensor([[IGNORE_INDEX]])], 1), 0.8) for a, b in zip(cu, cu[1:])]
    expected = [torch.cat([nn.functional.pad(row[i][:, :-1], (1, 0)) for row in rows], 1) for i in (0, 1)]
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected[0].sin().sum() + expected[1].square().sum(), parameters)
    if applied:
        lt.apply(model, lt.Plan(chunk_tokens=5))
    logp, entropy = lt.token_logprobs(model, ids, cu_seqlens=cu, temperature=0.8, chunk_tokens=4)
    assert_close(logp, expected[0]), assert_close(entropy, expected[1])
    for a, b in zip(torch.autograd.grad(logp.sin().sum() + entropy.square().sum(), parameters), wanted, strict=True):
        assert_close(a, b)
    with torch.no_grad():
        assert torch.equal(lt.token_logprobs(model, ids, cu_seqlens=cu, temperature=0.8, chunk_tokens=4)[0], logp)


def test_bad_input():
    model, ids = (
        LanguageModel(ModelConfig(vocab_size=9, num_layers=1, hidden_size=8, intermediate_size=8, num_heads=2, num_kv_heads=1)),
        torch.ones(2, 5).long(),
    )
    for arguments, message in ((dict(temperature=0), "temperature must be positive"), (dict(cu_seqlens=[0, 5]), "batch of 2"),
                               (dict(attention_mask=torch.ones(2, 5)), "takes no attention_mask")):
        with pytest.raises(ValueError, match=message):
            lt.token_logprobs(model, ids, **arguments)
    with pytest.raises(ValueError, match="batch, tokens"):
        lt.token_logprobs(model, ids[0])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        streamed_token_logprobs(torch.ones(1, 2, 8), nn.Identity(), model.lm_head, torch.tensor([[1, 9]]))
