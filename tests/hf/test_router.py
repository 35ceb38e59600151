"""The auxiliary loss of mixtures of experts, over the whole sequence, and its gradients."""

import hf_families
import pytest
import torch

import longtrain as lt
from tests.hf.test_families import UPCASTS, quick_or_slow

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe"]


@pytest.mark.parametrize("family", quick_or_slow(FAMILIES, ["qwen3_moe"]))
def test_the_balancing_loss_is_that_of_the_whole_sequence(family):
    model = hf_families.build(family, router_aux_loss_coef=3.0)
    call = dict(output_router_logits=True, use_cache=False)
    for _, batch in hf_families.batches():
        own, plain = hf_families.gradients(model, batch, **call), hf_families.gradients(model, batch, use_cache=False)
        assert hf_families.difference(plain, own) > 1e-2, "the auxiliary loss must matter"
        expected = model(**batch, **call)
        report = lt.apply(model, lt.Plan(chunk_tokens=8, loss_chunk_tokens=8))
        report.check_replay()
        found = model(**batch, output_router_logits=True)
        assert float(found.aux_loss) == pytest.approx(float(expected.aux_loss), rel=1e-6)
        assert [r.shape for r in found.router_logits] == [r.shape for r in expected.router_logits]
        assert hf_families.difference(hf_families.gradients(model, batch, output_router_logits=True), own) <= UPCASTS
        assert hf_families.difference(hf_families.gradients(model, batch), plain) <= UPCASTS
        report.undo()


def test_asked_for_by_the_config_and_in_evaluation():
    model = hf_families.build("mixtral", output_router_logits=True, router_aux_loss_coef=3.0)
    batch = dict(hf_families.batches())["one row"]
    own = hf_families.gradients(model, batch, use_cache=False)
    lt.apply(model, lt.Plan(chunk_tokens=8, loss_chunk_tokens=8))
    assert hf_families.difference(hf_families.gradients(model, batch), own) <= UPCASTS
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(float(own["loss"]), rel=UPCASTS)
    assert len(model.generate(batch["input_ids"][:, :5], max_new_tokens=3)[0]) == 8


def test_refused_where_it_would_be_wrong():
    model, batch = hf_families.build("mixtral"), dict(hf_families.batches())["one row"]
    report = lt.apply(model, lt.Plan(chunk_tokens=8, segment_layers=2))
    with pytest.raises(ValueError, match="output_router_logits=True.*segment_layers=1"):
        model(**batch, output_router_logits=True)
    report.undo()
    dense = hf_families.build("llama")
    lt.apply(dense, lt.Plan(chunk_tokens=8))
    with pytest.raises(ValueError, match="output_router_logits=True"):
        dense(**batch, output_router_logits=True)
