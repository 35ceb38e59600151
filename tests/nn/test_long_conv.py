"""Convolution layers against plain torch, their learned transforms against DFTs, and their parameters in an optimizer's groups."""

import pytest
import torch

from longtrain.nn import Hyena, LongConv, LongConvMixerModule, MonarchMixerBlock, parameter_groups
from longtrain.nn.butterfly import Butterfly, inverse, transform
from longtrain.nn.filters import TapFilter
from longtrain.ops.long_conv import long_conv
from longtrain.span import Layout

F64 = torch.float64


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def grads(y, leaves):
    return torch.autograd.grad(y.sin().sum(), leaves)


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("size", [4, 8, 64, 128])
def test_a_butterfly_begins_as_the_dft(size):
    b, x = Butterfly(size), torch.randn(3, size)
    spectrum = transform(x, b.first, b.second)
    p = len(b.second)
    by_frequency = spectrum.mT.flatten(-2)  # f = f1 + p f2
    torch.testing.assert_close(by_frequency, torch.fft.fft(x), rtol=1e-12, atol=1e-12)
    assert p * len(b.first) == size
    torch.testing.assert_close(inverse(spectrum, b.inverse_first, b.inverse_second), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("documents", [None, (0, 5, 6, 19)])
@pytest.mark.parametrize("taps", [1, 2, 8, 37])
def test_a_long_convolution_with_a_new_butterfly_is_the_one_without(taps, documents):
    plain, learned = LongConv(5, taps, causal=False), LongConv(5, taps, causal=False, butterfly=19)
    learned.load_state_dict(plain.state_dict(), strict=False)
    layout = None if documents is None else Layout.make(19, documents)
    inputs = [torch.randn(2, 19, 5, requires_grad=True) for _ in range(3)]
    ours, theirs = learned(*inputs, documents=layout), plain(*inputs, documents=layout)
    assert_close([ours], [theirs])
    assert_close(grads(ours, [*inputs, learned.filter.taps, learned.skip]), grads(theirs, [*inputs, plain.filter.taps, plain.skip]))


def test_a_butterfly_refuses_what_it_cannot():
    with pytest.raises(ValueError, match="sees the future"):
        LongConv(4, 8, butterfly=16)
    with pytest.raises(ValueError, match="power of two"):
        Butterfly(12)
    conv = LongConv(4, 8, causal=False, butterfly=10)
    with pytest.raises(ValueError, match="takes documents of 12 tokens, found 13"):
        conv(torch.randn(1, 13, 4))
    x = torch.randn(1, 24, 4)  # two of 12 are not too long
    assert_close([conv(x, documents=Layout.make(24, [0, 12, 24]))], [torch.cat([conv(x[:, :12]), conv(x[:, 12:])], dim=1)])


@pytest.mark.parametrize("causal", [True, False])
def test_a_long_convolution_is_the_op_with_its_squashed_filter(causal):
    conv, x = LongConv(5, 23, causal=causal, smooth=3, squash=0.004), torch.randn(2, 11, 5, requires_grad=True)
    taps = conv.filter.taps.detach().requires_grad_()
    by_lag = taps if causal else torch.fft.fftshift(taps, -1)
    padded = torch.nn.functional.pad(by_lag, (1, 1))
    k = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
    k = k if causal else torch.fft.ifftshift(k, -1)
    k = k.sign() * (k.abs() - 0.004).clamp_min(0)
    theirs = long_conv(x, k, conv.skip, causal=causal, backend="reference")
    assert_close([conv(x)], [theirs])
    assert_close(grads(conv(x), [x, conv.filter.taps]), grads(theirs, [x, taps]))


@pytest.mark.parametrize("order", [2, 3])
def test_hyena_is_its_recurrence(order):
    layer, x = Hyena(4, 16, order=order).double(), torch.randn(2, 16, 4)
    z = layer.in_proj(x)
    short = layer.short.filter()
    z = z + sum(short[:, lag] * torch.nn.functional.pad(z, (0, 0, lag, 0))[:, :16] for lag in range(3))
    v, *gates = z.chunk(order + 1, -1)
    z = gates[0] * v
    for filter, gate in zip(layer.filters, gates[1:], strict=True):
        k = filter()
        toeplitz = torch.stack([torch.stack([k[:, t - s] if t >= s else torch.zeros(4) for s in range(16)]) for t in range(16)])
        z = gate * (torch.einsum("tse,bse->bte", toeplitz, z) + z)
    assert_close([layer(x)], [layer.out_proj(z)])


def test_a_monarch_mixer_block_sees_both_ways_and_only_its_own_document():
    block, x = MonarchMixerBlock(8, 12), torch.randn(1, 12, 8, requires_grad=True)
    (reach,) = torch.autograd.grad(block(x)[:, 5].square().sum(), x)
    assert (reach.norm(dim=-1) > 1e-6).all()
    layout = Layout.make(12, (0, 4, 9, 12))
    (reach,) = torch.autograd.grad(block(x, documents=layout)[:, 5].square().sum(), x)
    assert (reach.norm(dim=-1)[0] > 1e-12).tolist() == [4 <= t < 9 for t in range(12)]
    separate = torch.cat([block(x[:, a:b]) for a, b in ((0, 4), (4, 9), (9, 12))], 1)
    assert_close([block(x, documents=layout)], [separate])


@pytest.mark.parametrize("implicit", [False, True])
def test_the_decoder_mixer_is_causal_and_stays_in_its_document(implicit):
    module = LongConvMixerModule(6, 20, implicit=implicit)
    x, layout = torch.randn(1, 20, 6, requires_grad=True), Layout.make(20, (0, 8, 20))
    (reach,) = torch.autograd.grad(module(x, None, module.mixer(layout))[:, 15].square().sum(), x)
    assert (reach.norm(dim=-1)[0] > 1e-12).tolist() == [8 <= t <= 15 for t in range(20)]


def test_filter_dropout_of_the_decoder_mixer_follows_from_seed_and_layer():
    first, second = (LongConvMixerModule(6, 20, dropout=0.5, layer_index=i) for i in range(2))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.mixer(None, 11).filter, first.mixer(None, 11).filter)
    assert not torch.equal(first.mixer(None, 11).filter, second.mixer(None, 11).filter)
    assert torch.equal(first.eval().mixer().filter, second.eval().mixer().filter)


def test_every_parameter_is_in_one_group_with_its_own_rate_and_decay():
    model = torch.nn.ModuleList([LongConv(4, 16, causal=False, butterfly=8), Hyena(4, 16), MonarchMixerBlock(8, 16)])
    groups = parameter_groups(model, lr=1e-2, weight_decay=0.2, filter_lr=3e-3)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("matrices", 1e-2, 0.2), ("vectors", 1e-2, 0.0), ("filters", 3e-3, 0.0), ("butterflies", 1e-3, 0.0)
    ]  # fmt: skip
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    assert {id(model[0].filter.taps), id(model[1].filters[0].outer)} <= {id(p) for p in groups[2]["params"]}
    assert len(groups[3]["params"]) == 4
    torch.optim.AdamW(groups)


def test_a_rate_of_zero_is_no_rate_that_was_left_out():
    model = torch.nn.ModuleList([LongConv(4, 16, causal=False, butterfly=8)])
    rates = {g["name"]: g["lr"] for g in parameter_groups(model, lr=1e-2, filter_lr=0.0, butterfly_lr=0.0)}
    assert rates == {"vectors": 1e-2, "filters": 0.0, "butterflies": 0.0}


def test_filters_of_a_class_of_ones_own_are_filters():
    class Own(TapFilter):
        pass

    model = LongConv(4, 16)
    model.filter = Own(4, 16)
    names = {g["name"]: len(g["params"]) for g in parameter_groups(model, lr=1e-2)}
    assert names == {"vectors": 1, "filters": 1}


MODULES = {
    "long conv": lambda: LongConv(6, 20),
    "butterfly": lambda: LongConv(6, 20, causal=False, smooth=3, butterfly=20),
    "hyena": lambda: Hyena(6, 20, order=3),
    "monarch mixer": lambda: MonarchMixerBlock(8, 20),
}


@pytest.mark.parametrize("name", MODULES)
def test_compiled_whole_without_breaks(name):
    module = MODULES[name]()
    x = torch.randn(2, 20, 8 if name == "monarch mixer" else 6, requires_grad=True)
    torch._dynamo.reset()
    ours = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    theirs = module(x)
    assert_close([ours, *grads(ours, [x, *module.parameters()])], [theirs, *grads(theirs, [x, *module.parameters()])])
