"""Experts chosen in the forward pass are those of its replay, even where rounding would choose others."""

import pytest
import torch
from torch import Tensor, nn

import longtrain as lt
from longtrain.ops.mixers import AttentionMixer
from longtrain.span import Span
from longtrain.stream.replay import RandomStates
from tests.stream.conftest import assert_same

pytestmark = pytest.mark.usefixtures("float64")

WIDTH, TOKENS, EXPERTS = 8, 23, 4


class Routed(nn.Module):
    """Attention, then the two best of four experts. `shift` moves the router's scores from the second run of a chunk on."""

    token_args: dict[str, int] = {}
    chooses = True

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.router = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
        self.shift, self.runs = None, 0

    def mixers(self):
        return (AttentionMixer(),)

    def example(self, tokens: int):
        return torch.randn(1, tokens, WIDTH), {}

    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        mix = mix or self.mixers()[0]
        x = x + mix(*self.qkv(x).unflatten(-1, (2, -1)).chunk(3, dim=-1)).flatten(-2)
        scores = self.router(x)
        if self.shift is not None and self.runs >= 5:  # the replays, after five chunks forward
            scores = scores + self.shift
        self.runs += 1
        best = torch.topk(scores, 2, dim=-1) if self.runs % 2 else scores.topk(2)
        chosen = self.experts[best.indices]
        return x + torch.einsum("btk,btkde,btd->bte", best.values.softmax(-1), chosen, x)


def gradients(layer, x):
    layer.zero_grad()
    layer.runs = 0
    layer(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("store_outputs", [0.0, 0.5, 1.0])
def test_replays_choose_as_the_forward_pass_did(store_outputs):
    model = nn.Module()
    model.layers = nn.ModuleList([Routed()])
    layer, x = model.layers[0], torch.randn(2, TOKENS, WIDTH)
    plain = gradients(layer, x)
    lt.apply(model, lt.Plan(chunk_tokens=5, store_outputs=store_outputs))
    assert_same(gradients(layer, x), plain)
    layer.shift = torch.tensor([50.0, 50.0, 50.0, 0.0])  # in the replays alone, which would never choose the last expert by themselves
    assert plain["experts"][3].ne(0).any() and gradients(layer, x)["experts"][3].ne(0).any()
    layer.chooses = False
    assert gradients(layer, x)["experts"][3].eq(0).all()


def test_choices_take_two_bytes_each():
    states, span = RandomStates(torch.device("cpu"), choices=True), Span(0, 3)
    with states.recorded(span):
        first = torch.randn(3, EXPERTS).topk(2)
    (kept,) = states._choices[span]
    assert kept.dtype == torch.int16
    with states.restored(span):
        again = torch.topk(torch.zeros(3, EXPERTS), 2)
    assert torch.equal(again.indices, first.indices) and (again.values == 0).all()
    with states.restored(span):
        assert torch.equal(torch.topk(torch.zeros(3, EXPERTS), k=2, dim=-1).indices, first.indices)
