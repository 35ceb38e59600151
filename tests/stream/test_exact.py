"""The streamed step equals plain autograd, in float64, over the things that break."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import longtrain as lt
from longtrain.nn import count_targets
from longtrain.ops.mixers import AttentionMixer
from longtrain.stream.carry import CARRIES, KVCarry
from longtrain.stream.protocol import KVBlock
from tests.stream.conftest import VOCAB, assert_same, assert_streamed_equals_plain, loss_and_grads, make_model

pytestmark = pytest.mark.usefixtures("float64")

TOKENS = 70


def call(tokens: int = TOKENS, batch: int = 1, **extra) -> dict:
    ids = torch.randint(VOCAB, (batch, tokens))
    return {"input_ids": ids, "labels": ids.clone(), **extra}


def masked() -> dict:
    masked_call = call()
    masked_call["labels"][:, :33] = -100
    masked_call["labels"][:, 40:43] = -100
    return masked_call


def documents(*edges: int) -> torch.Tensor:
    return torch.tensor([0, *edges, TOKENS], dtype=torch.int32)


FEATURES = {
    "plain": (dict(), call),
    "one kv head": (dict(num_kv_heads=1), call),
    "as many kv heads as heads": (dict(num_kv_heads=4), call),
    "window": (dict(window=(9,)), call),
    "window of one": (dict(window=(1,)), call),
    "window and full": (dict(window=(5, None)), call),
    "documents": (dict(), lambda: call(cu_seqlens=documents(3, 31))),
    "empty and one-token documents": (dict(), lambda: call(cu_seqlens=documents(1, 1, 21, 22, 69))),
    "documents and window": (dict(window=(6,)), lambda: call(cu_seqlens=documents(14, 41))),
    "masked labels": (dict(), masked),
    "token weights": (dict(), lambda: call(token_weights=torch.rand(1, TOKENS))),
    "dropout": (dict(attention_dropout=0.3), call),
    "dropout, window and documents": (dict(attention_dropout=0.3, window=(8, None)), lambda: call(cu_seqlens=documents(25, 50))),
    "tied head": (dict(tie_embeddings=True), call),
    "partial rotary": (dict(rope_fraction=0.34, rope_base=500.0), call),
    "batch of three": (dict(), lambda: call(batch=3)),
    "two tokens": (dict(), lambda: call(tokens=2)),
}


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, TOKENS, TOKENS + 50])
@pytest.mark.parametrize("feature", FEATURES)
def test_every_chunk_size_and_feature(feature, chunk_tokens):
    changes, make_call = FEATURES[feature]
    assert_streamed_equals_plain(make_model(**changes), lt.Plan(chunk_tokens=chunk_tokens), make_call())


@pytest.mark.parametrize("boundaries", ["stream", "tensor"])
@pytest.mark.parametrize("segment_layers", [1, 2, 3, 4])
@pytest.mark.parametrize("store_outputs, store_kv", [(1.0, 0.0), (0.0, 0.0), (0.45, 0.0), (0.45, 0.7), (0.3, 1.0), (1.0, 1.0), (0.0, 0.55)])
def test_segments_and_stored_ranges_split_inside_a_chunk(segment_layers, store_outputs, store_kv, boundaries):
    plan = lt.Plan(
        chunk_tokens=16, segment_layers=segment_layers, store_outputs=store_outputs, store_kv=store_kv, boundaries=boundaries,
        loss_chunk_tokens=11,
    )
    model = make_model(layers=5, window=(None, 13, None))
    assert_streamed_equals_plain(model, plan, call(cu_seqlens=documents(20, 37)))


def test_fractions_by_layer():
    plan = lt.Plan(chunk_tokens=9, segment_layers=2, store_outputs=(0.0, 0.5, 1.0), store_kv=(1.0, 0.2, 0.0))
    assert_streamed_equals_plain(make_model(layers=3), plan, call())


class ThreeBlocks(KVCarry):
    """Keys in up to three blocks, as ranks or tiers would give them."""

    def blocks(self, span):
        (whole,) = super().blocks(span)
        third = len(whole.span) // 3
        pieces = whole.span.split(whole.span.start + third, whole.span.start + 2 * third)
        tensors = (whole.k_BSKD, whole.v_BSKD, whole.dk_BSKD, whole.dv_BSKD)
        return [KVBlock(p, *(None if t is None else t[:, p.slice(whole.span.start)] for t in tensors)) for p in pieces]


@pytest.mark.parametrize("changes", [dict(), dict(window=(20,)), dict(attention_dropout=0.3)])
def test_several_key_blocks_are_merged(changes, monkeypatch):
    monkeypatch.setitem(CARRIES, AttentionMixer, ThreeBlocks)
    assert_streamed_equals_plain(make_model(**changes), lt.Plan(chunk_tokens=16, store_outputs=0.45), call())


def test_merged_blocks_keep_the_training_dtype(monkeypatch):
    monkeypatch.setitem(CARRIES, AttentionMixer, ThreeBlocks)
    model, inputs = make_model().bfloat16(), call()
    lt.apply(model, lt.Plan(chunk_tokens=16))
    model(**inputs).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("frozen", ["embed_tokens", "q_proj", "k_proj", "self_attn", "mlp", "layers.0", "norm", "lm_head", "model"])
@pytest.mark.parametrize("boundaries", ["stream", "tensor"])
def test_frozen_weights_get_no_gradient_and_change_none(frozen, boundaries):
    model = make_model(layers=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    assert_streamed_equals_plain(model, lt.Plan(chunk_tokens=16, segment_layers=2, boundaries=boundaries), call())


@pytest.mark.parametrize("trained", ["embed_tokens", "layers.0", "layers.2.mlp", "model.norm"])
@pytest.mark.parametrize("boundaries", ["stream", "tensor"])
def test_weights_that_alone_are_trained(trained, boundaries):
    model = make_model(layers=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    assert_streamed_equals_plain(model, lt.Plan(chunk_tokens=16, segment_layers=2, boundaries=boundaries), call())


def test_accumulation_over_micro_batches_with_unequal_valid_targets():
    calls = [masked(), call(), call(cu_seqlens=documents(10, 50))]
    total = sum(count_targets(c["labels"], c.get("cu_seqlens")) for c in calls)
    calls = [{**c, "normalizer": total} for c in calls]
    assert_streamed_equals_plain(make_model(), lt.Plan(chunk_tokens=16), *calls)


@pytest.mark.parametrize(
    "options", [dict(softcap=3.0), dict(z_loss=0.1), dict(label_smoothing=0.2), dict(softcap=2.0, z_loss=0.1, label_smoothing=0.1)]
)
def test_loss_options(options):
    from longtrain.ops.linear_cross_entropy import LossOptions

    weights = torch.rand(1, TOKENS)
    assert_streamed_equals_plain(
        make_model(), lt.Plan(chunk_tokens=16), call(loss_options=LossOptions(**options), token_weights=weights)
    )


@pytest.mark.parametrize("settings, message", [
    (dict(token_weights=torch.ones(1, TOKENS, requires_grad=True)), "token_weights are data and get no gradient"),
    (dict(reduction="sum", normalizer=3), "it would have no effect"),
    (dict(reduction="avg"), "reduction must be one of"),
])  # fmt: skip
def test_settings_of_the_loss_are_refused_streamed_or_not(settings, message):
    plain, streamed = make_model(), make_model()
    lt.apply(streamed, lt.Plan(chunk_tokens=16))
    for model in (plain, streamed):
        with pytest.raises(ValueError, match=message):
            model(**call(**settings))


def test_autocast_leaves_float64_as_it_is():
    model, inputs = make_model(), call()
    loss, grads = loss_and_grads(model, inputs)
    grads = {name: grad.clone() for name, grad in grads.items()}
    with torch.autocast("cpu", torch.bfloat16):
        plain_loss, plain = loss_and_grads(model, inputs)
        plain = {name: grad.clone() for name, grad in plain.items()}
        lt.apply(model, lt.Plan(chunk_tokens=16))
        streamed_loss, streamed = loss_and_grads(model, inputs)
    for found_loss, found in ((plain_loss, plain), (streamed_loss, streamed)):
        assert abs(float(found_loss - loss)) <= 1e-12 * float(loss)
        assert_same(found, grads)


def test_per_token_losses():
    model, inputs = make_model(), masked()
    weights = torch.rand(1, TOKENS)

    def run():
        model.zero_grad()
        losses = model(**inputs, reduction="none", token_weights=torch.arange(TOKENS)[None] / TOKENS).loss
        (losses * weights).sum().backward()
        return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    plain_losses, plain = run()
    lt.apply(model, lt.Plan(chunk_tokens=16, loss_chunk_tokens=9))
    losses, grads = run()
    assert losses.shape == (1, TOKENS)
    torch.testing.assert_close(losses, plain_losses, rtol=1e-12, atol=1e-14)
    for name in plain:
        assert (grads[name] - plain[name]).norm() <= 1e-12 * plain[name].norm(), name


def test_no_valid_target_gives_zero_loss_and_gradients():
    model, inputs = make_model(), call()
    inputs["labels"][:] = -100
    lt.apply(model, lt.Plan(chunk_tokens=16))
    loss = model(**inputs).loss
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_input_gradients(tokens):
    layers = make_model(layers=4).model.layers
    x = torch.randn(2, tokens, 24)

    def run():
        leaf = x.clone().requires_grad_()
        y = leaf * 1
        for layer in layers:
            y = layer(y, positions_BT=torch.arange(tokens).expand(2, tokens))
        y.sin().sum().backward()
        return y.detach(), leaf.grad

    plain = run()
    model = torch.nn.Module()
    model.layers = layers
    for boundaries in ("stream", "tensor"):
        report = lt.apply(model, lt.Plan(chunk_tokens=7, segment_layers=2, boundaries=boundaries))
        for a, b in zip(run(), plain, strict=True):
            assert (a - b).norm() <= 1e-12 * b.norm()
        report.undo()


@pytest.mark.parametrize("segment_layers", [1, 2])
@pytest.mark.parametrize("how", ["deepcopy", "saved"])
def test_a_copy_of_an_applied_model_streams_its_own_parameters(segment_layers, how):
    model = make_model(layers=4)
    lt.apply(model, lt.Plan(chunk_tokens=16, segment_layers=segment_layers))
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    inputs = call()
    loss, grads = loss_and_grads(model, inputs)
    copied_loss, copied_grads = loss_and_grads(copied, inputs)
    assert copied_loss == loss
    assert_same(copied_grads, grads, 0)
    assert all(copied_grads[name] is not grads[name] for name in grads)
