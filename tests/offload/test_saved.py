"""`saved_tensors` against plain autograd, bit by bit."""

import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longtrain.offload import DiskSettings, Place, TieredStore, saved_tensors
from tests.offload.stepped import Stepped


class Block(nn.Module):
    """A fused projection whose parts are views, attention, a gate, an exponential whose output is what is saved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out, self.gate = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        attended = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + F.silu(self.gate(x)) * x.clamp(max=1).exp() + self.gate.weight.t()[0]


def make_store(tier: str = "disk", seed: int = 0) -> TieredStore:
    disk = DiskSettings(path="/", budget=1 << 22)
    return TieredStore("cpu", host_bytes=1 << 22, disk=disk, staging_bytes=1 << 17, system=Stepped(seed))


def model_and_input(dtype=torch.float32, tokens: int = 37):
    torch.manual_seed(0)
    model = nn.Sequential(Block(32), nn.Dropout(0.1), Block(32)).to(dtype)
    return model, torch.randn(2, tokens, 32, dtype=dtype, requires_grad=True)


def gradients(model, x, context=None, passes: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(1)
    with context or warnings.catch_warnings():
        loss = model(x).square().sum()
    for left in reversed(range(passes)):
        found = torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=left > 0)
    return list(found)


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype, tokens", [(torch.float32, 37), (torch.float64, 1), (torch.bfloat16, 37)])
def test_gradients_are_those_of_plain_autograd(tier, dtype, tokens):
    model, x = model_and_input(dtype, tokens)
    expected = gradients(model, x)
    for seed in range(2):
        store = make_store(seed=seed)
        found = gradients(model, x, saved_tensors(store, place=Place(tier=tier), min_bytes=0))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert tier == "device" or store.stats.written.get(tier, 0) + store.stats.forwarded > 0
        gc.collect()
        assert store.names() == []
        store.close()


def test_the_graph_can_be_walked_twice():
    model, x = model_and_input()
    store = make_store()
    found = gradients(model, x, saved_tensors(store, min_bytes=0), passes=3)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(model, x), strict=True))
    store.close()


@pytest.mark.parametrize("min_bytes", [0, 1 << 40])
def test_second_derivatives(min_bytes):
    model, x = model_and_input(torch.float64)

    def second(context):
        torch.manual_seed(1)
        with context:
            loss = model(x).square().sum()
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), [x, *model.parameters()], allow_unused=True)

    store = make_store()
    found, expected = second(saved_tensors(store, min_bytes=min_bytes)), second(warnings.catch_warnings())
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    store.close()


def test_autocast():
    model, x = model_and_input()

    def run(context):
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(model, x, context)

    store = make_store()
    assert all(torch.equal(a, b) for a, b in zip(run(saved_tensors(store, min_bytes=0)), run(None), strict=True))
    store.close()


def saved_bytes(forward, **settings) -> tuple[int, TieredStore]:
    store = make_store()
    with saved_tensors(store, **settings):
        held = forward()
    store.settle()
    del held
    return store.stats.written.get("disk", 0), store


def test_parameters_and_their_views_stay():
    weight = nn.Parameter(torch.randn(64, 64))
    x = torch.randn(5, 64)
    assert saved_bytes(lambda: F.linear(x, weight).mul(weight[0]), min_bytes=0)[0] == 2 * x.nbytes  # x, and what it became
    assert saved_bytes(lambda: weight.t().exp().mm(weight), min_bytes=0)[0] == weight.nbytes


def test_what_is_excluded_and_what_is_small_stays():
    x, weight = torch.randn(5, 64), nn.Parameter(torch.randn(64, 64))
    assert saved_bytes(lambda: F.linear(x[1:], weight), min_bytes=0, exclude=[x])[0] == 0
    assert saved_bytes(lambda: F.linear(x, weight), min_bytes=x.nbytes + 1)[0] == 0
    assert saved_bytes(lambda: F.linear(x, weight), min_bytes=x.nbytes)[0] == x.nbytes


def test_what_the_backward_pass_needs_next_is_fetched_ahead():
    x, store = torch.randn(5, 64, requires_grad=True), make_store()
    with saved_tensors(store, min_bytes=0):
        y = x.exp().exp().exp().sum()
    store.settle()
    y.backward()
    assert store.stats.most_fetched > x.nbytes
    store.close()


def test_bytes_that_are_saved_twice_are_written_once():
    x, weight = torch.randn(5, 64), nn.Parameter(torch.randn(64, 64))
    written, store = saved_bytes(lambda: [F.linear(x, weight), F.linear(x.view(1, 5, 64), weight)], min_bytes=0)
    assert written == x.nbytes and store.stats.deduplicated == 1


def test_views_of_one_projection_are_not_taken_for_each_other():
    fused = torch.randn(8, 2, 16)
    fused = fused + 0
    w = torch.randn(8, 16, requires_grad=True)
    store = make_store()
    with saved_tensors(store, min_bytes=0):
        loss = (fused[:, 0] * w).sum() + 2 * (fused[:, 1] * w).sum()
    store.settle()
    assert torch.equal(torch.autograd.grad(loss, w)[0], fused[:, 0] + 2 * fused[:, 1])
    store.close()


@pytest.mark.parametrize("min_bytes", [0, 1 << 20])
def test_an_edit_before_backward_is_refused_or_harmless(min_bytes):
    w = torch.randn(64, requires_grad=True)
    x = torch.randn(64)
    store = make_store()
    with saved_tensors(store, min_bytes=min_bytes):
        loss = (x * w).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()
    store.close()


def test_an_edit_after_the_bytes_are_away_uses_what_was_saved():
    w, x = torch.randn(64, requires_grad=True), torch.randn(64)
    before = x.clone()
    store = make_store()
    with saved_tensors(store, min_bytes=0):
        loss = (x * w).sum()
    store.settle()
    x.add_(1)
    loss.backward()
    assert torch.equal(w.grad, before)
    store.close()


def test_a_store_is_made_from_settings(disk):
    model, x = model_and_input()
    expected = gradients(model, x)
    context = saved_tensors(DiskSettings(path=disk, budget=1 << 24), min_bytes=0)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, x, context), expected, strict=True))
