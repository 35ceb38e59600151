"""attn_implementation="longtrain" alone: equal to transformers' own attention, in training and in generation with a KV cache."""

import hf_families
import pytest
import torch

import longtrain.hf as hf
from longtrain.hf.attention import MaskedAttention, Options, longtrain_attention, with_sinks
from longtrain.hf.mask import Mask, longtrain_mask
from longtrain.ops import attention
from longtrain.span import Span
from longtrain.stream.carry import KVCarry
from longtrain.stream.protocol import KVBlock
from tests.hf.test_mask import FUNCTIONS, padding

ids = lambda *shape: torch.randint(3, hf_families.VOCAB, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize("arguments", [{}, dict(prefill_chunk_size=5)], ids=["prefill at once", "prefill by chunks"])
@pytest.mark.parametrize("pads", [0, 4])
def test_generation_is_that_of_the_models_own_attention(family, arguments, pads):
    model = hf_families.build(family).eval()
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :pads] = 0
    call = dict(inputs=ids(2, 13), attention_mask=mask, max_new_tokens=9, do_sample=False, output_logits=True, return_dict_in_generate=True)
    own = model.generate(**call)
    model.set_attn_implementation("longtrain")
    ours = model.generate(**call, **arguments)
    assert torch.equal(ours.sequences, own.sequences)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours.logits, own.logits, strict=True))


def test_without_streaming_gradients_are_those_of_the_models_own_attention():
    model = hf_families.build("mistral")
    for name, batch in hf_families.batches():
        model.set_attn_implementation("sdpa")
        own = hf_families.gradients(model, batch, use_cache=False)
        model.set_attn_implementation("longtrain")
        error = hf_families.difference(hf_families.gradients(model, batch, use_cache=False), own)
        assert error <= 1e-6, f"{name}: {error:.1e}"


def qkv(batch=2, tokens=23, heads=4, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(0)
    make = lambda h: torch.randn(batch, tokens, h, dim, dtype=torch.float64, generator=generator).requires_grad_()
    return make(heads), make(kv_heads), make(kv_heads)


class TwoBlocks(KVCarry):
    """Keys in two blocks, as slower tiers and other ranks will yield them."""

    def blocks(self, span):
        (block,) = super().blocks(span)
        halves = block.span.split((block.span.start + block.span.stop) // 2)
        cut = lambda x, half: None if x is None else x[:, half.slice(block.span.start)]
        tensors = (block.k_BSKD, block.v_BSKD, block.dk_BSKD, block.dv_BSKD)
        return [KVBlock(half, *(cut(x, half) for x in tensors)) for half in halves]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", ["causal", "window", "chunked after padding"])
@pytest.mark.parametrize("carry_of", [KVCarry, TwoBlocks])
def test_a_streamed_mask_is_the_whole_mask(name, sinks, carry_of):
    """The carry of rows that differ, span by span and backwards, against autograd through dense attention."""
    mask = longtrain_mask(2, 23, 23, mask_function=FUNCTIONS[name], attention_mask=padding((0, 20), (4, 23)))
    q, k, v = qkv()
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * 0.4
    scores = scores.masked_fill(~mask.dense(2), -torch.inf)
    column = sink[None, :, None, None].expand(2, 4, 23, 1) if sinks else torch.full((2, 4, 23, 1), -torch.inf)
    probabilities = torch.cat([scores, column.double()], -1).softmax(-1)[..., :-1].nan_to_num()
    expected = torch.einsum("bhts,bshd->bthd", probabilities, v.repeat_interleave(2, 2))
    dout = torch.randn(expected.shape, dtype=torch.float64)
    dout = dout * (mask.dense(2).any(-1).squeeze(1)[..., None, None])  # rows that see nothing are NaN in the softmax above
    leaves = [q, k, v, *([sink] if sinks else [])]
    expected_grads = torch.autograd.grad(expected, leaves, dout)

    query = with_sinks(q, sink).detach() if sinks else q.detach()
    mixer = MaskedAttention.make(mask, Options(scale=0.4, softcap=None, dropout=0.0, sinks=sinks), None)
    spans = [Span(0, 9), Span(9, 18), Span(18, 23)]
    carry, outs = carry_of(mixer, spans), []
    for span in spans:
        carry.append(span, k.detach()[:, span.slice()], v.detach()[:, span.slice()])
        outs.append(carry.mix(span, query[:, span.slice()], None))
    out = torch.cat([o for o, _ in outs], 1)
    visible = mask.dense(2).any(-1).squeeze(1)
    assert (out - expected)[visible].abs().max() < 1e-12
    assert (out[~visible] == 0).all()
    grads = [torch.zeros_like(query), torch.zeros_like(k), torch.zeros_like(v)]
    carry, given = carry_of(mixer, spans), 23
    for span, (o, lse) in reversed(list(zip(spans, outs, strict=True))):
        for needed in (s for s in reversed(spans) if carry.first_needed(span) <= s.start < given):
            carry.prepend(needed, k.detach()[:, needed.slice()], v.detach()[:, needed.slice()], queries=span)
        given = carry.first_needed(span)
        grads[0][:, span.slice()] = carry.mix_vjp(span, query[:, span.slice()], o, lse, dout[:, span.slice()])
        grads[1][:, span.slice()], grads[2][:, span.slice()] = carry.take_grad(span)
    if sinks:
        grads = [grads[0][..., :-1], *grads[1:], grads[0][..., -1].sum((0, 1))]
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert (grad - wanted).norm() <= 1e-12 * wanted.norm()


def test_dropout_is_a_function_of_the_seed_and_differs_between_rows():
    q, k, v = (x.detach() for x in qkv())
    q, k, v = (x[:1].expand(2, *x.shape[1:]) for x in (q, k, v))
    mask = longtrain_mask(2, 23, 23, attention_mask=padding((0, 22), (0, 23)))
    mixer = MaskedAttention.make(mask, Options(scale=None, softcap=None, dropout=0.4, sinks=False), 7)
    out = mixer(q, k, v)
    assert torch.equal(out, mixer(q, k, v))
    assert not torch.equal(out[0, :20], out[1, :20])
    plain = attention(q[:1], k[:1], v[:1], causal=True, dropout_p=0.4, dropout_seed=7, backend="reference")
    assert torch.allclose(out[:1, :22], plain[:, :22])


def test_a_call_without_a_mask_follows_the_module():
    q, k, v = (x.detach().transpose(1, 2) for x in qkv())
    module = torch.nn.Module()
    module.is_causal = False
    out, none = longtrain_attention(module, q, k, v, None, scaling=0.4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.4, enable_gqa=True).transpose(1, 2)
    assert none is None and torch.allclose(out, expected)
    module.is_causal = True
    out, _ = longtrain_attention(module, q, k, v, None, sliding_window=3)
    expected = attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, window_size=(2, 0))
    assert torch.allclose(out, expected)


def test_tensors_as_masks_and_biases_are_refused():
    q, k, v = (x.detach().transpose(1, 2) for x in qkv())
    with pytest.raises(ValueError, match=r"mask tensor of shape \[2, 1, 23, 23\].*batch, tokens"):
        longtrain_attention(torch.nn.Module(), q, k, v, torch.zeros(2, 1, 23, 23))
    with pytest.raises(ValueError, match="a position bias"):
        longtrain_attention(torch.nn.Module(), q, k, v, Mask.plain(23, 23, causal=True), position_bias=torch.zeros(1, 4, 23, 23))
    with pytest.raises(ValueError, match="given together"):
        longtrain_attention(torch.nn.Module(), q[:1], k[:1], v[:1], Mask.plain(23, 23, causal=True), cu_seq_lens_q=torch.tensor([0, 23]))


def test_registered_names():
    from transformers import AttentionInterface, AttentionMaskInterface

    assert AttentionInterface()["longtrain"] is hf.longtrain_attention
    assert AttentionMaskInterface()["longtrain"] is hf.longtrain_mask
