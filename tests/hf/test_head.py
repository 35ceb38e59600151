"""Logits that are a promise: the streamed loss and its gradients against full logits, and the logits themselves when somebody reads
them."""

from functools import partial

import hf_families
import pytest
import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

import longtrain as lt
from longtrain.hf.head import LazyLogits, lazy_forward, streamed_loss
from longtrain.logprobs import _from_logits
from tests.hf.test_families import UPCASTS

PLAN = lt.Plan(chunk_tokens=8, loss_chunk_tokens=8)


def model_and_batch(family="llama", **changes):
    return hf_families.build(family, **changes), dict(hf_families.batches())["masked prompts"]


@pytest.mark.parametrize("family, changes", [("llama", {}), ("llama", dict(tie_word_embeddings=True)), ("gemma2", {}), ("cohere", {})],
                         ids=["plain", "tied", "softcap", "scale"])
@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)], ids=["mean", "int", "tensor"])
def test_the_loss_is_that_of_full_logits(family, changes, items):
    model, batch = model_and_batch(family, **changes)
    arguments = {} if items is None else dict(num_items_in_batch=items)
    own = hf_families.gradients(model, batch, use_cache=False, **arguments)
    lt.apply(model, PLAN)
    assert hf_families.difference(hf_families.gradients(model, batch, **arguments), own) <= UPCASTS
    logits = model(**batch).logits
    assert isinstance(logits, LazyLogits) and logits.computed is None


def test_shifted_labels_are_taken_as_they_are():
    model, batch = model_and_batch()
    labels = batch.pop("labels")
    shifted = dict(batch, labels=labels, shift_labels=labels.roll(-1, 1))
    own = hf_families.gradients(model, shifted, use_cache=False)
    lt.apply(model, PLAN)
    assert hf_families.difference(hf_families.gradients(model, shifted), own) <= UPCASTS


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_logits_are_there_when_they_are_read(family):
    model, batch = model_and_batch(family)
    del batch["labels"]
    own = model(**batch, use_cache=False).logits
    (own[:, ::3].sin().sum()).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    report = lt.apply(model, PLAN)
    logits = model(**batch).logits
    assert logits.shape == own.shape and logits.dtype == own.dtype and "not computed" in repr(logits)
    (logits[:, ::3].sin().sum()).backward()
    assert (logits - own).norm() <= UPCASTS * own.norm()
    for name, p in model.named_parameters():
        assert (p.grad - grads[name]).norm() <= UPCASTS * grads[name].norm()
    report.undo()
    assert type(model(**batch).logits) is torch.Tensor


def test_few_logits_are_computed_at_once():
    head = nn.Linear(4, 9)
    few, many = (lazy_forward(head, head.forward, 6, torch.randn(1, tokens, 4)) for tokens in (6, 7))
    assert type(few) is torch.Tensor and isinstance(many, LazyLogits)


STEPS = {
    "scale": lambda z: z * 0.5,
    "number first": lambda z: 0.5 * z,
    "softcap": lambda z: torch.tanh(z / 3.0) * 3.0,
    "scale and softcap": lambda z: ((z * 2.0) / 3.0).tanh() * 3.0,
    "widened": lambda z: z.float() / 2,
    "to": lambda z: z.to(torch.float64).contiguous(),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_on_logits_are_noted_and_repeated(name):
    head = nn.Linear(4, 9, bias=False)
    hidden = torch.randn(2, 7, 4)
    lazy = STEPS[name](lazy_forward(head, head.forward, 6, hidden))
    assert isinstance(lazy, LazyLogits) and lazy.computed is None
    expected = STEPS[name](head(hidden))
    assert lazy.dtype == expected.dtype and torch.equal(lazy.compute(), expected)
    recipe = lazy.recipe
    logits = recipe.scale * head(hidden)
    logits = logits if recipe.softcap is None else recipe.softcap * torch.tanh(logits / recipe.softcap)
    assert torch.allclose(logits, expected.float(), atol=1e-6)


@pytest.mark.parametrize(
    "step", [lambda z: z + 1, lambda z: z * torch.ones(9), lambda z: z.tanh().tanh(), lambda z: 1 / z, lambda z: z.tanh() * -1.0]
)
def test_other_steps_compute_the_logits(step):
    head = nn.Linear(4, 9, bias=False)
    hidden = torch.randn(2, 7, 4)
    done = step(lazy_forward(head, head.forward, 6, hidden))
    assert type(done) is torch.Tensor and torch.equal(done, step(head(hidden)))


def test_logits_that_were_edited_in_place_are_what_loss_and_log_probabilities_are_of():
    head = nn.Linear(4, 9, bias=False)
    hidden, labels = torch.randn(2, 7, 4), torch.randint(8, (2, 7))
    lazy, expected = lazy_forward(head, head.forward, 6, hidden), head(hidden)
    for logits in (lazy, expected):
        logits[..., 8] = -30.0  # as families do that have tokens of images
    assert type(lazy * 0.5) is torch.Tensor and torch.equal(lazy * 0.5, expected * 0.5)
    (found,), (wanted,) = (
        torch.autograd.grad(streamed_loss(ForCausalLMLoss, logits, labels, 9), head.weight, retain_graph=True)
        for logits in (lazy, expected)
    )
    assert torch.equal(found, wanted) and (wanted[8] == 0).all()
    for found, wanted in zip(*(_from_logits(logits, labels, 1.0, None) for logits in (lazy, expected)), strict=True):
        assert torch.equal(found, wanted)


def test_a_head_with_bias_streams_and_a_scaled_one_is_computed():
    for factor in (1.0, 0.5):
        head = nn.Linear(4, 9).double()
        hidden, labels = torch.randn(2, 7, 4, dtype=torch.float64), torch.randint(9, (2, 7))
        loss = partial(streamed_loss, ForCausalLMLoss)(lazy_forward(head, head.forward, 6, hidden) * factor, labels, 9)
        assert torch.allclose(loss.double(), ForCausalLMLoss(head(hidden) * factor, labels, 9).double(), rtol=1e-6)


def test_a_loss_function_of_the_users_own_is_left_alone():
    model, batch = model_and_batch()
    model.loss_function = lambda logits, labels, **unused: logits.sum()
    mine = model.loss_function
    report = lt.apply(model, PLAN)
    assert "lm_head" in str(report) and "only ForCausalLMLoss is streamed" in str(report)
    assert model.loss_function is mine and type(model(**batch).logits) is torch.Tensor
