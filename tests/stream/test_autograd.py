"""Honest autograd: gradients arrive once, misuse is refused, nothing is left behind."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

import longtrain as lt
from tests.stream.conftest import VOCAB, assert_same, loss_and_grads, make_model

TOKENS = 40


@pytest.fixture
def ids():
    return torch.randint(VOCAB, (1, TOKENS))


@pytest.fixture(params=["stream", "tensor"])
def plan(request):
    return lt.Plan(chunk_tokens=16, segment_layers=2, store_outputs=0.5, boundaries=request.param)


def stores_of(report):
    return [chain.store.names() for chain in report._chains]


def test_parameter_hooks_fire_once_with_the_whole_gradient(ids, plan):
    model = make_model(layers=3)
    lt.apply(model, plan)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: seen[name].append(grad.clone()))
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert len(seen[name]) == 1, name
        assert torch.equal(seen[name][0], parameter.grad), name


def test_accumulates_into_existing_gradients(ids, plan):
    model = make_model()
    lt.apply(model, plan)
    model(ids, labels=ids).loss.backward()
    once = [p.grad.clone() for p in model.parameters()]
    model(ids, labels=ids).loss.backward()
    for p, g in zip(model.parameters(), once, strict=True):
        assert torch.equal(p.grad, 2 * g)


def test_int32_labels_are_refused_streamed_or_not(ids, plan):
    model = make_model()
    for streamed in (False, True):
        if streamed:
            lt.apply(model, plan)
        with pytest.raises(ValueError, match=r"target must be int64, not torch.int32"):
            model(ids, labels=ids.int())


def test_second_backward_is_refused(ids, plan):
    model = make_model()
    lt.apply(model, plan)
    loss = model(ids, labels=ids).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


def test_second_backward_through_the_layers_is_refused(ids, plan):
    model = make_model()
    lt.apply(model, plan)
    y = model(ids).logits.sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        y.backward()


def test_double_backward_is_refused(plan):
    model = make_model()
    lt.apply(model, plan)
    x = torch.randn(1, TOKENS, 24, requires_grad=True)
    y = x
    for layer in model.model.layers:
        y = layer(y, positions_BT=torch.arange(TOKENS)[None])
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_no_grad_streams_and_saves_nothing(ids, plan):
    model = make_model()
    with torch.no_grad():
        expected = model(ids, labels=ids).loss
    report = lt.apply(model, plan)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)
    assert stores_of(report) == [[]]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, labels=ids).loss, expected)


def test_an_empty_batch_is_refused_and_the_next_is_exact(float64, ids, plan):
    model = make_model()
    loss, grads = loss_and_grads(model, dict(input_ids=ids, labels=ids))
    grads = {name: grad.clone() for name, grad in grads.items()}
    lt.apply(model, plan)
    for empty in (ids[:, :0], ids[:0]):
        with pytest.raises(ValueError, match="at least one token"):
            model(empty, labels=empty)
    streamed_loss, streamed = loss_and_grads(model, dict(input_ids=ids, labels=ids))
    torch.testing.assert_close(streamed_loss, loss)
    assert_same(streamed, grads)


def test_no_grad_holds_one_boundary(ids):
    model = make_model(layers=3)
    report = lt.apply(model, lt.Plan(chunk_tokens=16))
    held = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: held.append(len(report._chains[0].store.held())))
    with torch.no_grad():
        model(ids, labels=ids)
    assert held == [2] * 9  # of a boundary's three spans one is being read, and gone from the store before the next boundary has its own


def test_a_dropped_graph_releases_its_extents(ids, plan):
    model = make_model()
    report = lt.apply(model, plan)
    loss = model(ids, labels=ids).loss
    assert stores_of(report) != [[]]
    del loss
    gc.collect()
    assert stores_of(report) == [[]]


def test_in_place_edit_of_a_saved_input_is_refused(plan):
    model = make_model(layers=2)
    lt.apply(model, plan)
    x = torch.randn(1, TOKENS, 24, requires_grad=True)
    hidden = x * 1
    y = hidden
    for layer in model.model.layers:
        y = layer(y, positions_BT=torch.arange(TOKENS)[None])
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified"):
        y.sum().backward()


def test_in_place_edit_of_a_weight_before_backward_is_refused(ids, plan):
    model = make_model()
    lt.apply(model, plan)
    loss = model(ids, labels=ids).loss
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


def test_a_stand_in_read_between_layers_is_nan():
    model = make_model(layers=2)
    lt.apply(model, lt.Plan(chunk_tokens=16))
    y = model.model.layers[0](torch.randn(1, TOKENS, 24), positions_BT=torch.arange(TOKENS)[None])
    assert y.shape == (1, TOKENS, 24) and y.isnan().all() and y.stride() == (0, 0, 0)


@pytest.mark.parametrize("change", [lambda y: y + 1, lambda y: y.detach()[0, 0, 0].fill_(5.0)])
def test_a_change_between_streamed_layers_is_refused(change):
    model = make_model(layers=2)
    lt.apply(model, lt.Plan(chunk_tokens=16))
    positions = torch.arange(TOKENS)[None]
    y = model.model.layers[0](torch.randn(1, TOKENS, 24), positions_BT=positions)
    changed = change(y)
    with pytest.raises(RuntimeError, match='boundaries="tensor"|not given the output'):
        model.model.layers[1](changed if changed.shape == y.shape else y, positions_BT=positions)


def test_an_edited_argument_is_refused(plan):
    model = make_model(layers=2)
    lt.apply(model, plan)
    positions = torch.arange(TOKENS)[None]
    y = torch.randn(1, TOKENS, 24, requires_grad=True)
    for layer in model.model.layers:
        y = layer(y, positions_BT=positions)
    positions.zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()


def test_a_tensor_that_a_hook_brings_in_is_refused(ids, plan):
    """Its gradient would be lost: a vector that is trained and added to what a module gives out. Brought in before apply, or later."""
    model, steer = make_model(layers=3), torch.zeros(24, requires_grad=True)
    bring = lambda: model.model.layers[1].mlp.register_forward_hook(lambda module, args, y: y + steer)
    handle = bring()
    with pytest.raises(ValueError, match=r"layers.1 cannot be streamed: .* shape \[24\] that wants a gradient.*register it as a parameter"):
        lt.apply(model, plan)
    handle.remove()
    lt.apply(model, plan)
    bring()
    with pytest.raises(RuntimeError, match="register it as a parameter"):
        model(ids, labels=ids).loss.backward()
    steer.requires_grad_(False)
    model(ids, labels=ids).loss.backward()


def test_anomaly_detection_needs_tensor_boundaries(ids):
    model = make_model(layers=2)
    report = lt.apply(model, lt.Plan(chunk_tokens=16))
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match='boundaries="tensor"'):
        model(ids, labels=ids)
    report.undo()
    lt.apply(model, lt.Plan(chunk_tokens=16, boundaries="tensor"))
    with torch.autograd.detect_anomaly():
        model(ids, labels=ids).loss.backward()


def test_check_replay_compares_with_the_forward(ids):
    model = make_model(layers=1)
    report = lt.apply(model, lt.Plan(chunk_tokens=16))
    report.check_replay()
    loss = model(ids, labels=ids).loss
    model.model.layers[0].self_attn.rotary.base = 17.0
    with pytest.raises(RuntimeError, match="other bits than the forward pass: q differs"):
        loss.backward()


@pytest.mark.parametrize("change", ["hidden states", "arguments"])
def test_a_change_inside_a_segment_is_refused(change):
    model = make_model(layers=2)
    lt.apply(model, lt.Plan(chunk_tokens=16, segment_layers=2, boundaries="tensor"))
    positions = torch.arange(TOKENS)[None]
    y = model.model.layers[0](torch.randn(1, TOKENS, 24), positions_BT=positions)
    with pytest.raises(RuntimeError, match="segment_layers=1"):
        if change == "hidden states":
            model.model.layers[1](y + 1, positions_BT=positions)
        else:
            model.model.layers[1](y, positions_BT=positions + 1)


def test_autocast_is_captured_and_entered_again(ids, plan):
    model = make_model(layers=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(ids, labels=ids).loss
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    report = lt.apply(model, plan)
    report.check_replay()  # replayed keys and values are bf16, bit for bit: only so inside autocast
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert abs(loss - plain) < 1e-2 * plain
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        assert (p.grad - expected[name]).norm() < 0.05 * expected[name].norm(), name


def test_backward_inside_autocast(ids, plan):
    model = make_model(layers=2)
    report = lt.apply(model, plan)
    report.check_replay()
    grads = []
    for inside in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch before 2.13 has no grad_dtype")
def test_grad_dtype_receives_the_unrounded_sum(ids, plan):
    wide = make_model(layers=2)
    model = make_model(layers=2).bfloat16()
    model.load_state_dict(wide.state_dict())
    lt.apply(model, plan)
    for p in model.parameters():
        p.grad_dtype = torch.float32
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32, name
        if plan.boundaries == "stream" or "embed" not in name:  # else autograd makes the embedding's gradient in bf16
            assert not torch.equal(p.grad, p.grad.bfloat16().float()), name


def test_main_grad_receives_the_unrounded_sum(ids, plan):
    model = make_model(layers=2).bfloat16()
    lt.apply(model, plan)
    streamed = [p for name, p in model.named_parameters() if plan.boundaries == "stream" or "embed" not in name]
    for p in streamed:
        p.main_grad = torch.zeros_like(p, dtype=torch.float32)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
    for p in streamed:
        assert p.grad is None
        assert p.main_grad.any() and not torch.equal(p.main_grad, p.main_grad.bfloat16().float())


def test_bitwise_repeatable(ids, plan):
    model = make_model(layers=3, attention_dropout=0.2)
    lt.apply(model, plan)
    first = loss_and_grads(model, dict(input_ids=ids, labels=ids))
    first = first[0], {n: g.clone() for n, g in first[1].items()}
    second = loss_and_grads(model, dict(input_ids=ids, labels=ids))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][n], second[1][n]) for n in first[1])


def test_dropout_masks_change_from_step_to_step(ids, plan):
    model = make_model(attention_dropout=0.5)
    lt.apply(model, plan)
    with torch.no_grad():
        assert model(ids, labels=ids).loss != model(ids, labels=ids).loss


def test_progress_is_reported_and_can_stop(ids, plan):
    model = make_model(layers=2)
    report = lt.apply(model, plan)
    seen = []
    report.on_progress(lambda phase, done, total: seen.append((phase, done, total)))
    model(ids, labels=ids).loss.backward()
    assert [s for s in seen if s[0] == "forward"] == [("forward", i, 3) for i in (1, 2, 3)]
    assert [s for s in seen if s[0] == "backward"] == [("backward", i, 3) for i in (1, 2, 3)]
    report.on_progress(None)
    seen.clear()
    model(ids, labels=ids)
    assert not seen


@pytest.mark.usefixtures("float64")
def test_hooks_on_the_embedding_are_called(ids):
    """Noise on embeddings and adapters' `enable_input_require_grads` come as hooks: the result is what the hook gives out."""
    model = make_model()
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output * 2)
    expected = loss_and_grads(model, {"input_ids": ids, "labels": ids})[1]
    expected = {name: g.clone() for name, g in expected.items()}
    lt.apply(model, lt.Plan(chunk_tokens=8))
    assert_same(loss_and_grads(model, {"input_ids": ids, "labels": ids})[1], expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("option", [dict(padding_idx=3), dict(max_norm=0.5), dict(sparse=True), dict(scale_grad_by_freq=True)], ids=str)
def test_an_embedding_that_is_more_than_a_table_is_called_as_it_is(ids, option):
    model = make_model()
    for name, value in option.items():
        setattr(model.model.embed_tokens, name, value)
    call, streamed = {"input_ids": ids % 7, "labels": ids}, copy.deepcopy(model)
    expected = loss_and_grads(model, call)[1]
    lt.apply(streamed, lt.Plan(chunk_tokens=8))
    found = loss_and_grads(streamed, call)[1]
    assert_same(*({name: g.to_dense() for name, g in grads.items()} for grads in (found, expected)))
