"""Convolutions streamed by span (short filters) and by channel group, against plain autograd."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import longtrain as lt
from longtrain.nn import Attention, Hyena, LongConv, LongConvMixerModule, MonarchMixerBlock, RMSNorm
from longtrain.ops.mixers import LongConvMixer
from longtrain.span import Layout, Span, chunk_spans
from longtrain.stream.carry import is_causal
from longtrain.stream.conv_carry import ConvCarry
from tests.stream.conftest import assert_same

pytestmark = pytest.mark.usefixtures("float64")

WIDTH, TOKENS = 8, 37


class Layer(nn.Module):
    """A decoder layer around a mixer with the interface of `nn.Attention`."""

    token_args = {"positions_BT": 1}

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.self_attn, self.mlp = RMSNorm(WIDTH), mixer, nn.Linear(WIDTH, WIDTH)

    def mixers(self, *, positions_BT: Tensor, documents: Layout | None = None, dropout_seed: int | None = None):
        return (self.self_attn.mixer(documents, dropout_seed),)

    def forward(self, x, *, positions_BT, documents=None, dropout_seed=None, mix=None):
        if mix is None:
            (mix,) = self.mixers(positions_BT=positions_BT, documents=documents, dropout_seed=dropout_seed)
        x = x + self.self_attn(self.norm(x), positions_BT, mix)
        return x + self.mlp(x).tanh()

    def example(self, tokens: int):
        return torch.randn(1, tokens, WIDTH), {"positions_BT": torch.arange(tokens)[None], "dropout_seed": 0}


class Ungated(nn.Module):
    """A bare `LongConv` in the place of attention."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.conv = LongConv(WIDTH, **settings)

    def mixer(self, documents=None, dropout_seed=None):
        return self.conv.mixer(documents, dropout_seed)

    def forward(self, x, positions_BT, mix):
        return mix(x)


class GroupsOfThree(Ungated):
    def mixer(self, documents=None, dropout_seed=None):
        return replace(super().mixer(documents, dropout_seed), group_channels=3)


def stack_of(*layers: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    return model


def run(model: nn.Module, x: Tensor, **arguments) -> dict[str, Tensor]:
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = leaf
    for layer in model.layers:
        y = layer(y, **arguments)
    (y.sin() * torch.linspace(0.1, 1, y.numel()).view(y.shape)).sum().backward()
    return {"y": y.detach(), "x": leaf.grad, **{n: p.grad.clone() for n, p in model.named_parameters()}}


def assert_streams(model: nn.Module, x: Tensor, plan: lt.Plan, **arguments) -> None:
    plain = run(model, x, **arguments)
    report = lt.apply(model, plan)
    report.check_replay()
    streamed = run(model, x, **arguments)
    report.undo()
    assert_same(streamed, plain)
    assert not [name for chain in report._chains for name in chain.store.names()]


def decoder_arguments(documents: tuple[int, ...] | None = None, tokens: int = TOKENS) -> dict:
    layout = Layout.make(tokens, documents)
    return dict(positions_BT=layout.positions()[None], documents=layout, dropout_seed=3)


@pytest.mark.parametrize("documents", [None, (0, 9, 10, 30, TOKENS)])
@pytest.mark.parametrize("store_outputs, store_kv", [(1.0, 0.0), (0.0, 0.0), (0.45, 0.6), (0.0, 1.0)])
@pytest.mark.parametrize("taps, chunk", [(1, 7), (2, 7), (5, 7), (8, 7), (5, 4), (5, TOKENS), (37, 100), (2, 1)])
def test_short_filters_stream_by_span(taps, chunk, store_outputs, store_kv, documents):
    model = stack_of(Layer(LongConvMixerModule(WIDTH, taps, init_std=0.3)), Layer(Ungated(taps=taps, init_std=0.3)))
    assert all(is_causal(layer.self_attn.mixer(), chunk) for layer in model.layers)
    plan = lt.Plan(chunk_tokens=chunk, segment_layers=2, store_outputs=store_outputs, store_kv=store_kv)
    assert_streams(model, torch.randn(1 if documents else 2, TOKENS, WIDTH), plan, **decoder_arguments(documents))


@pytest.mark.parametrize("tokens", [1, 3])
def test_sequences_shorter_than_chunk_and_filter(tokens):
    model = stack_of(Layer(LongConvMixerModule(WIDTH, 6)))
    assert_streams(model, torch.randn(1, tokens, WIDTH), lt.Plan(chunk_tokens=5), **decoder_arguments(tokens=tokens))


@pytest.mark.parametrize("boundaries", ["stream", "tensor"])
@pytest.mark.parametrize("segment_layers", [1, 3])
def test_a_hybrid_of_convolution_window_and_full_attention_in_one_segment(segment_layers, boundaries):
    attention = dict(num_heads=2, num_kv_heads=1, head_dim=4)
    model = stack_of(
        Layer(LongConvMixerModule(WIDTH, 6, smooth=3, dropout=0.3, init_std=0.3)),
        Layer(Attention(WIDTH, **attention, window=5)),
        Layer(Attention(WIDTH, **attention)),
    )
    plan = lt.Plan(chunk_tokens=7, segment_layers=segment_layers, store_outputs=0.5, store_kv=0.3, boundaries=boundaries)
    assert_streams(model, torch.randn(1, TOKENS, WIDTH), plan, **decoder_arguments((0, 20, TOKENS)))


def test_filters_longer_than_a_chunk_stream_by_channel_group():
    model = stack_of(
        Layer(LongConvMixerModule(WIDTH, 9, dropout=0.3)), Layer(LongConvMixerModule(WIDTH, 50, implicit=True)), Layer(Ungated(taps=60))
    )
    assert not any(is_causal(layer.self_attn.mixer(None, 0), 7) for layer in model.layers)
    assert_streams(model, torch.randn(1, TOKENS, WIDTH), lt.Plan(chunk_tokens=7, store_outputs=0.0), **decoder_arguments((0, 20, TOKENS)))


@pytest.mark.parametrize("store_outputs", [0.0, 1.0])
@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Hyena(WIDTH, 40), lambda: Hyena(WIDTH, 40, order=3), lambda: Hyena(WIDTH, 20, causal=False),
        lambda: MonarchMixerBlock(WIDTH, 40),
    ],
    ids=["hyena", "hyena3", "hyena-both-ways", "m2"],
)  # fmt: skip
def test_hyena_and_monarch_mixer_stream(make, chunk, store_outputs):
    model = stack_of(make(), make())
    assert_streams(model, torch.randn(2, TOKENS, WIDTH), lt.Plan(chunk_tokens=chunk, store_outputs=store_outputs))
    if chunk == 7:
        layout = Layout.make(TOKENS, (0, 5, 30, TOKENS))
        assert_streams(model, torch.randn(1, TOKENS, WIDTH), lt.Plan(chunk_tokens=chunk, store_outputs=store_outputs), documents=layout)


def test_learned_butterflies_stream_by_channel_group():
    model = stack_of(Layer(GroupsOfThree(taps=2 * TOKENS - 1, causal=False, butterfly=TOKENS)))
    with torch.no_grad():
        for p in model.layers[0].self_attn.conv.butterfly.parameters():
            p += 0.1 * torch.randn_like(p)  # no DFT any more
    assert_streams(model, torch.randn(2, TOKENS, WIDTH), lt.Plan(chunk_tokens=9), **decoder_arguments())


def test_the_carry_holds_little_more_than_a_chunk_and_the_filter():
    mixer = LongConvMixer(filter=torch.randn(WIDTH, 5), skip=torch.randn(WIDTH))
    carry = ConvCarry(mixer, chunk_spans(1000, 20))
    for span in chunk_spans(1000, 20):
        carry.append(span, torch.randn(1, len(span), WIDTH))
        assert carry._v_BSE._buffer.shape[1] <= 50
        assert carry.mix(span, None, None)[0].shape == (1, 20, WIDTH)
    assert mixer.keys_for(Span(40, 60)) == Span(36, 60)


def test_bfloat16_filters_gather_their_gradients_in_float32():
    torch.manual_seed(0)
    layer = Layer(LongConvMixerModule(WIDTH, 5, init_std=0.3)).bfloat16()
    x = torch.randn(1, 2048, WIDTH, dtype=torch.bfloat16)
    arguments = decoder_arguments(tokens=2048)
    exact = run(stack_of(layer.double()), x.double(), **arguments)
    model = stack_of(layer.bfloat16())
    plain = run(model, x, **arguments)
    lt.apply(model, lt.Plan(chunk_tokens=16))
    streamed = run(model, x, **arguments)
    for name in ("layers.0.self_attn.filter.taps", "layers.0.self_attn.skip"):
        error, plain_error = (float((g[name].double() - exact[name]).norm() / exact[name].norm()) for g in (streamed, plain))
        assert error <= plain_error + 2**-9, (name, error, plain_error)  # one rounding more; sums in bfloat16 are 3 to 10 times that
