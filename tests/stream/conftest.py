"""Plain autograd beside the streamed step: one comparison, used by every test here."""

from __future__ import annotations

import pytest
import torch

import longtrain as lt
from longtrain.nn import LanguageModel, ModelConfig

VOCAB = 61
TOLERANCE = 1e-12
"""Relative norm of the difference, per tensor. float64 rounds at 1.1e-16; the longest sum here has under 10^4 terms, whose order may
change: 10^4 x 1.1e-16."""


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_model(layers: int = 2, **changes) -> LanguageModel:
    shape = dict(
        vocab_size=VOCAB, num_layers=layers, hidden_size=24, intermediate_size=40, num_heads=4, num_kv_heads=2, initializer_range=0.2
    )
    return LanguageModel(ModelConfig(**{**shape, **changes}))


def loss_and_grads(model: torch.nn.Module, *calls: dict, seed: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Summed loss and gradients of one call or several (micro-batches)."""
    torch.manual_seed(seed)
    model.zero_grad()
    total = 0
    for call in calls:
        loss = model(**call).loss
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad for name, p in model.named_parameters()}


def assert_same(a: dict[str, torch.Tensor | None], b: dict[str, torch.Tensor | None], tolerance: float = TOLERANCE) -> None:
    assert a.keys() == b.keys()
    overall = torch.stack([g.norm() for g in b.values() if g is not None]).norm()
    for name in a:
        assert (a[name] is None) == (b[name] is None), name
        if a[name] is not None:
            # A gradient that is zero by mathematics (a softmax over one key) is rounding noise on both sides: hold that to the whole.
            norm = b[name].norm()
            error = float((a[name] - b[name]).norm() / (norm if norm > 1e-10 * overall else overall))
            assert error <= tolerance, f"{name}: {error:.2e}"


def assert_streamed_equals_plain(model: LanguageModel, plan: lt.Plan, *calls: dict) -> None:
    loss, grads = loss_and_grads(model, *calls)
    grads = {name: None if g is None else g.clone() for name, g in grads.items()}
    report = lt.apply(model, plan)
    report.check_replay()
    streamed_loss, streamed_grads = loss_and_grads(model, *calls)
    report.undo()
    assert abs(float(streamed_loss - loss)) <= TOLERANCE * abs(float(loss))
    assert_same(streamed_grads, grads)
    assert all(not chain.store.names() for chain in report._chains), "extents were left behind"
