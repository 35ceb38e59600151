"""Gradients of tiny models of every family in the table, streamed, against the model's own: float64, five kinds of batches."""

import hf_families
import pytest
import torch

import longtrain as lt

UPCASTS = 1e-6
"""transformers computes norms and the loss in float32 (unit roundoff 6e-8) in any model; over three layers that reaches 1e-7."""
EXACT = 1e-10
"""Where nothing upcasts: float64 rounds at 1e-16, and the random weights amplify it by less than 10^6."""

QUICK = ["llama", "gemma2", "mixtral", "gpt_oss", "lfm2"]
NOT_STREAMED = {"jamba": {0, 2}, "minimax": {1}}
REFUSED = {
    "doge": 'cannot be run on 13 tokens with attn_implementation="longtrain"',
    "bloom": "AttentionInterface",
    "gptj": "AttentionInterface",
    "mamba": "no layer of MambaForCausalLM can be streamed",
}
STREAMED = [family for family in hf_families.FAMILIES if family not in REFUSED]


FLOAT32_RECURRENCES = {"qwen3_next", "qwen3_5_text", "olmo_hybrid", "mamba2", "bamba", "granitemoehybrid"}


def quick_or_slow(families, quick):
    return [pytest.param(f, marks=[] if f in quick else [pytest.mark.slow]) for f in families]


@pytest.mark.parametrize("family", quick_or_slow(STREAMED, QUICK))
def test_gradients_are_the_models_own(family):
    model = hf_families.build(family)
    batches = list(hf_families.batches())
    own = [hf_families.own_gradients(model, batch) for _, batch in batches]
    recurrent = family in FLOAT32_RECURRENCES
    bounds = [
        hf_families.bound(model, batch, expected) if recurrent else UPCASTS for (_, batch), expected in zip(batches, own, strict=True)
    ]
    report = lt.apply(model, lt.Plan(chunk_tokens=8, loss_chunk_tokens=8, layer_fallback="unstreamed"))
    report.check_replay()
    for (name, batch), expected, bound in zip(batches, own, bounds, strict=True):
        error = hf_families.difference(hf_families.gradients(model, batch), expected)
        assert error <= bound, f"{name}: {error:.1e}"
    left = {int(e.name.rsplit(".", 1)[1]) for e in report.entries if e.why and e.name.rsplit(".", 1)[1].isdigit()}
    assert left == NOT_STREAMED.get(family, set()), report
    assert all(not chain.store.names() for chain in report._chains), "extents were left behind"


DROPPING = ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_neox", "cohere", "olmo2", "glm4", "mixtral", "gpt_oss",
            "phi", "gpt2", "opt", "starcoder2", "stablelm", "qwen3_moe"]  # fmt: skip


@pytest.mark.parametrize("family", quick_or_slow(DROPPING, ["gpt_neox", "mistral"]))
def test_dropout_is_that_of_the_models_own_graph_given_the_masks(family):
    """Hidden dropout by masks drawn chunk by chunk and noted; attention's by its hash, of the seeds that were drawn."""
    error = hf_families.dropout_difference(family)
    assert error is not None, "nothing was drawn"
    assert error <= UPCASTS, f"{error:.1e}"


@pytest.mark.parametrize("family", quick_or_slow(["gpt_neox", "phi", "starcoder2", "stablelm", "gpt2", "opt", "biogpt"], ["gpt_neox"]))
def test_a_family_that_never_upcasts_is_exact(family):
    """Seen at the decoder's output: the loss of transformers converts logits to float32 whatever the model."""
    model = hf_families.build(family)
    batches = list(hf_families.batches())
    decoder = model.base_model

    def outcome(batch):
        model.zero_grad()
        hidden = decoder(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).last_hidden_state
        # what padding attends to is nobody's business: its hidden states differ between transformers' own implementations
        seen = hidden * batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[..., None]
        loss = (seen * torch.sin(torch.arange(seen[0].numel()).view(seen[0].shape))).sum()
        loss.backward()
        return {"loss": loss.detach(), **{name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}}

    own = [outcome(batch) for _, batch in batches]
    lt.apply(model, lt.Plan(chunk_tokens=8))
    for (name, batch), expected in zip(batches, own, strict=True):
        error = hf_families.difference(outcome(batch), expected)
        assert error <= EXACT, f"{name}: {error:.1e}"


@pytest.mark.parametrize("family", list(REFUSED))
def test_what_cannot_be_streamed_is_refused_with_its_reason(family):
    model = hf_families.build(family)
    with pytest.raises(ValueError, match=REFUSED[family]):
        lt.apply(model, lt.Plan(chunk_tokens=8, layer_fallback="unstreamed"))
    assert model.config._attn_implementation in ("sdpa", "eager") and model.config.use_cache


def test_a_layer_that_looks_across_tokens_is_refused_by_default():
    model = hf_families.build("jamba")
    with pytest.raises(ValueError, match="layers.0 cannot be streamed: its output in chunks of 5 differs.*unstreamed"):
        lt.apply(model, lt.Plan(chunk_tokens=8))
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", quick_or_slow(["mixtral", "qwen3_moe", "olmoe", "gpt_oss"], ["qwen3_moe"]))
def test_experts_in_float32(family):
    """With the experts' default kernels, which have no float64. A rounding error that flipped an expert would be off by percents."""
    model = hf_families.build(family).float()
    model.set_experts_implementation("grouped_mm")
    batches = list(hf_families.batches())
    own = [hf_families.gradients(model, batch, use_cache=False) for _, batch in batches]
    lt.apply(model, lt.Plan(chunk_tokens=8, loss_chunk_tokens=8)).check_replay()
    for (name, batch), expected in zip(batches, own, strict=True):
        error = hf_families.difference(hf_families.gradients(model, batch), expected)
        assert error <= 1e-5, f"{name}: {error:.1e}"
