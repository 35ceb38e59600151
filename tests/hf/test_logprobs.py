"""lt.token_logprobs of transformers models, against full logits."""

import hf_families
import pytest
import torch

import longtrain as lt
from tests.hf.test_families import UPCASTS


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("batch", ["left-padded", "right-padded", "packed"])
def test_they_are_those_of_full_logits(family, batch):
    model, batch = hf_families.build(family), dict(hf_families.batches())[batch]
    model.config._attn_implementation = "eager" if family == "gemma2" else "sdpa"
    ids, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    keep = torch.ones_like(ids) if mask is None else mask
    if family == "gemma2":
        model.set_attn_implementation("longtrain")  # eager attention is NaN on padding in float64
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.double() / 0.7
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    real = (keep[:, 1:] * keep[:, :-1]).bool()
    if positions is not None:
        real = real & (positions[:, 1:] > 0)
    expected = [torch.where(real, t[:, :-1], 0) for t in (logp.gather(-1, ids.roll(-1, 1)[..., None])[..., 0], entropy)]
    wanted = torch.autograd.grad(expected[0].sin().sum() + expected[1].square().sum(), list(model.parameters()))
    lt.apply(model, lt.Plan(chunk_tokens=8, loss_chunk_tokens=8))
    cu = None if positions is None else [*(positions[0] == 0).nonzero()[:, 0].tolist(), 29]
    found = lt.token_logprobs(model, ids, attention_mask=mask, cu_seqlens=cu, temperature=0.7)
    for a, b in zip(found, expected, strict=True):
        assert (a[:, 0] == 0).all() and (a[:, 1:] - b).norm() <= UPCASTS * b.norm()
    grads = torch.autograd.grad(found[0].sin().sum() + found[1].square().sum(), list(model.parameters()))
    assert (
        hf_families.difference(dict(enumerate(grads)) | {"loss": torch.ones(1)}, dict(enumerate(wanted)) | {"loss": torch.ones(1)})
        <= UPCASTS
    )


def test_a_model_that_was_not_applied_is_refused_beyond_a_chunk():
    model = hf_families.build("llama", vocab_size=40_000)
    ids = torch.randint(3, 97, (1, 100))
    with pytest.raises(ValueError, match=r"all logits, \[1, 100, 40000\].*lt.apply"):
        lt.token_logprobs(model, ids)
    logp, _ = lt.token_logprobs(model, ids[:, :9])
    assert logp.shape == (1, 9) and (logp[:, 1:] < 0).all()
