"""Attention and MLPs of transformers models, replaced one by one, against the models' own."""

import copy

import hf_families
import pytest
import torch

import longtrain as lt

PARTS = {"llama": ("self_attn", "mlp"), "mistral": ("self_attn", "mlp"), "phi3": ("self_attn", "mlp"), "gpt_neox": ("attention", "mlp"),
         "gpt2": ("attn", "mlp"), "gemma2": ("self_attn", "mlp"), "gpt_oss": ("self_attn", None), "deepseek_v3": ("self_attn", None)}


def layers_of(model):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


@pytest.mark.parametrize("family", PARTS)
def test_gradients_are_the_models_own(family):
    model = hf_families.build(family)
    names = list(model.state_dict())
    batches = [batch for _, batch in hf_families.batches()]
    own = [hf_families.own_gradients(model, batch) for batch in batches]
    attention, mlp = PARTS[family]
    layer = layers_of(model)[1]  # one of three: the others stay
    setattr(layer, attention, lt.nn.hf_attention(getattr(layer, attention)))
    if mlp is not None:
        setattr(layer, mlp, lt.nn.by_chunks(getattr(layer, mlp), 8, features=32))
    assert list(model.state_dict()) == names
    assert getattr(layer, attention).config._attn_implementation == "longtrain" != model.config._attn_implementation
    for batch, expected in zip(batches, own, strict=True):
        if model.config._attn_implementation == "eager" and "attention_mask" in batch:
            continue  # NaN in eager attention's padded rows, whose gradients reach all others
        error = hf_families.difference(hf_families.gradients(model, batch, use_cache=False), expected)
        assert error <= 1e-6, f"{error:.1e}"  # transformers' norms and loss upcast to float32
    assert hf_families.difference(hf_families.gradients(copy.deepcopy(model), batches[0], use_cache=False), own[0]) <= 1e-6


def test_alone_they_are_exact():
    """Nothing of these two upcasts: in float64, the module against itself."""
    layer = layers_of(hf_families.build("llama"))[0]
    x, positions = torch.randn(2, 29, 32, dtype=torch.float64), torch.randn(2, 1, 29, 8, dtype=torch.float64).unbind(0)

    def outcome(module, *args, **kwargs):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        y = module(leaf, *args, **kwargs)
        (y[0] if isinstance(y, tuple) else y).sin().sum().backward()
        return [leaf.grad, *(p.grad for p in module.parameters())]

    attention = lt.nn.hf_attention(layer.self_attn)
    layer.self_attn.config._attn_implementation = "sdpa"
    for ours, theirs in ((outcome(attention, positions), outcome(layer.self_attn, positions)),
                         (outcome(lt.nn.by_chunks(layer.mlp, 8)), outcome(layer.mlp))):
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() <= 1e-12 * b.norm()


def test_they_stream_inside_a_streamed_model():
    model, batch = hf_families.build("llama"), dict(hf_families.batches())["one row"]
    own = hf_families.gradients(model, batch, use_cache=False)
    layer = layers_of(model)[1]
    layer.mlp = lt.nn.by_chunks(layer.mlp, 3)
    lt.apply(model, lt.Plan(chunk_tokens=8, loss_chunk_tokens=8))
    assert hf_families.difference(hf_families.gradients(model, batch), own) <= 1e-6


def test_what_they_cannot_take_is_refused():
    with pytest.raises(ValueError, match="AttentionInterface"):
        lt.nn.hf_attention(layers_of(hf_families.build("bloom"))[0].self_attention)
    with pytest.raises(ValueError, match="gives out tuple|cannot run by chunks"):
        lt.nn.by_chunks(layers_of(hf_families.build("mixtral"))[0].self_attn, 8)
    layer = layers_of(hf_families.build("llama"))[0]
    attention, x, positions = (
        lt.nn.hf_attention(layer.self_attn),
        torch.randn(1, 5, 32, dtype=torch.float64),
        torch.ones(2, 1, 5, 8).double(),
    )
    for mask in (torch.eye(5, dtype=torch.bool).flip(0), torch.randn(5, 5), torch.ones(5, 5).tril().bool().expand(2, 5, 5)):
        with pytest.raises(ValueError, match="mask tensor of shape.*cannot be honoured|padding inside"):
            attention(x, positions, mask.view(1, -1, 5, 5))
