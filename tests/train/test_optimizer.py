"""The optimizer against AdamW in float32, in both dtypes; and the learning rate."""

import math

import pytest
import torch
from torch import nn

from longtrain.config.schema import TrainConfig
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.train.optimizer import Optimizer
from longtrain.train.schedule import learning_rate


def build(**settings):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 4))
    return model, Optimizer(model, TrainConfig(steps=10, **settings))


def backward(model, optimizer, inputs):
    for x in inputs:
        model(x.to(next(model.parameters()).dtype)).float().pow(2).sum().backward()
        optimizer.collect()


@pytest.mark.parametrize("clip", [None, 0.1, 1e6])
def test_float32_is_torch_adamw_with_clipping_and_no_decay_on_vectors(clip):
    model, optimizer = build(grad_clip=clip, lr=1e-2, weight_decay=0.5)
    reference, _ = build()
    groups = [
        {"params": [p for p in reference.parameters() if p.ndim > 1], "weight_decay": 0.5},
        {"params": [p for p in reference.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for _ in range(3):
        inputs = [torch.randn(5, 8), torch.randn(2, 8)]
        backward(model, optimizer, inputs)
        norm = optimizer.grad_norm()
        optimizer.update(1e-2, norm)
        for x in inputs:
            reference(x).pow(2).sum().backward()
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), math.inf if clip is None else clip)
        adamw.step()
        adamw.zero_grad()
        torch.testing.assert_close(norm, expected)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.grad is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("gradient", [0.0, 1.0])
def test_filters_have_a_rate_of_their_own_and_no_decay(gradient, implicit, dtype):
    """AdamW's first step is the rate, whatever the gradient; without one, decay alone is left."""
    shape = dict(vocab_size=16, num_layers=2, hidden_size=8, intermediate_size=8, num_heads=2, num_kv_heads=2)
    model = LanguageModel(ModelConfig(**shape, layers=("conv", "attention"), conv_taps=5, conv_implicit=implicit))
    settings = dict(lr=1e-2, filter_lr=1e-3, weight_decay=0.5 * (1 - gradient), grad_clip=None)
    optimizer = Optimizer(model, TrainConfig(steps=10, dtype=dtype, **settings))
    before = [m.detach().clone() for m in optimizer.masters]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient, dtype=torch.float32 if optimizer.wide_gradients else None)
    optimizer.collect()
    optimizer.update(5e-3, optimizer.grad_norm())
    for name, master, start in zip(optimizer.names, optimizer.masters, before, strict=True):
        rate, decays = (5e-4, False) if ".filter." in name else (5e-3, start.ndim > 1)
        expected = start * (1 - 5e-3 * settings["weight_decay"] * decays) - rate * gradient
        torch.testing.assert_close(master.detach(), expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("wide_gradients", [True, False])
def test_bfloat16_keeps_updates_too_small_for_its_own_weights(wide_gradients):
    model, optimizer = build(dtype="bfloat16", lr=1e-5, weight_decay=0.0)
    if wide_gradients and not optimizer.wide_gradients:
        pytest.skip("this torch has no grad_dtype")
    if not wide_gradients and optimizer.wide_gradients:
        for parameter in optimizer.parameters:
            parameter.grad_dtype = torch.bfloat16
        optimizer.wide_gradients = False
    before = [p.detach().clone() for p in optimizer.masters]
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    for _ in range(4):
        backward(model, optimizer, [torch.ones(1, 8)])
        optimizer.update(1e-5, optimizer.grad_norm())
    for parameter, master, start in zip(model.parameters(), optimizer.masters, before, strict=True):
        assert master.dtype == torch.float32
        torch.testing.assert_close((master - start).abs(), torch.full_like(start, 4e-5), rtol=0.05, atol=0)
        assert torch.equal(parameter, master.to(torch.bfloat16))


@pytest.mark.parametrize("wide_gradients", [True, False])
def test_bfloat16_gradients_are_summed_in_float32(wide_gradients):
    """257 backward passes of gradient 1: bfloat16 would stop at 256."""
    parameter = nn.Linear(1, 1, bias=False)
    optimizer = Optimizer(parameter, TrainConfig(steps=1, dtype="bfloat16"))
    if wide_gradients and not optimizer.wide_gradients:
        pytest.skip("this torch has no grad_dtype")
    if not wide_gradients and optimizer.wide_gradients:
        parameter.weight.grad_dtype = torch.bfloat16
        optimizer.wide_gradients = False
    for _ in range(257):
        parameter(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.collect()
    assert float(optimizer.grad_norm()) == 257.0


def test_the_learning_rate_rises_linearly_and_falls_along_half_a_cosine():
    config = TrainConfig(steps=101, lr=1.0, warmup_steps=4, min_lr_ratio=0.2)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[52] == pytest.approx(0.6) and rates[100] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))
    assert rates[28] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_a_linear_schedule_falls_on_a_line():
    config = TrainConfig(steps=21, lr=2.0, warmup_steps=0, schedule="linear", min_lr_ratio=0.0)
    assert [learning_rate(config, step) for step in (0, 5, 10, 20)] == pytest.approx([2.0, 1.5, 1.0, 0.0])


@pytest.mark.parametrize("decay_steps, falls_after", [(25, 75), (None, 80)])
def test_warmup_stable_decay_holds_and_then_falls_by_the_square_root(decay_steps, falls_after):
    config = TrainConfig(steps=101, lr=1.0, warmup_steps=4, schedule="wsd", decay_steps=decay_steps, min_lr_ratio=0.2)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and rates[4 : falls_after + 1] == [1.0] * (falls_after - 3)
    quarter = falls_after + (100 - falls_after) / 4
    assert rates[100] == pytest.approx(0.2)
    if quarter.is_integer():
        assert rates[int(quarter)] == pytest.approx(0.2 + 0.8 * 0.5)
    assert all(a > b for a, b in zip(rates[falls_after:], rates[falls_after + 1 :], strict=False))


def test_a_constant_schedule_stays_and_a_run_of_one_step_has_a_rate():
    assert learning_rate(TrainConfig(steps=9, lr=0.5, schedule="constant"), 8) == 0.5
    assert learning_rate(TrainConfig(steps=1, lr=0.5), 0) == 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tensors_are_the_live_ones_and_filling_them_goes_on_bit_for_bit(dtype):
    inputs = [torch.randn(5, 8) for _ in range(4)]
    model, optimizer = build(dtype=dtype)
    untouched = {name: tensor.clone() for name, tensor in build(dtype=dtype)[1].tensors().items()}
    for x in inputs[:2]:
        backward(model, optimizer, [x])
        optimizer.update(1e-2, optimizer.grad_norm())
    held = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    assert held.keys() == untouched.keys() and all(not torch.equal(held[n], untouched[n]) for n in held)
    other, another = build(dtype=dtype)
    for name, tensor in another.tensors().items():
        tensor.copy_(held[name])
    another.copy_to_model()
    for x in inputs[2:]:
        for m, o in ((model, optimizer), (other, another)):
            backward(m, o, [x])
            o.update(1e-2, o.grad_norm())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(tensor, another.tensors()[name]) for name, tensor in optimizer.tensors().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_on_the_host_it_is_the_same_to_the_bit_and_holds_one_gradient_at_a_time(dtype, clip):
    runs = []
    for on_host in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 4))
        optimizer = Optimizer(model, TrainConfig(steps=10, dtype=dtype, grad_clip=clip), on_host=on_host)
        assert (optimizer.masters[0] is model[0].weight) == (not on_host and dtype == "float32")
        for step in range(3):
            backward(model, optimizer, [torch.randn(5, 8, generator=torch.Generator().manual_seed(step))])
            optimizer.update(1e-2, optimizer.grad_norm())
        assert all(p.grad is None for p in (*model.parameters(), *optimizer.masters))
        runs.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
