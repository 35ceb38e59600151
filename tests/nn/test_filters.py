"""Filters: squash, smooth and dropout do what they say, the defaults train, and what would never train is refused or warned of."""

import copy
import warnings

import pytest
import torch
from torch import nn

from longtrain.nn import LongConv
from longtrain.nn.filters import ImplicitFilter, TapFilter, decay_lengths, distances, smooth, squash


def test_squash_by_hand():
    k = torch.tensor([[0.5, -0.2, 0.1, -1.0]], requires_grad=True)
    squashed = squash(k, 0.2)
    torch.testing.assert_close(squashed, torch.tensor([[0.3, 0.0, 0.0, -0.8]]))
    squashed.sum().backward()
    assert k.grad.tolist() == [[1, 0, 0, 1]]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("taps", [1, 2, 7, 8])
def test_smooth_is_the_mean_over_neighbouring_lags(taps, causal):
    k = torch.randn(2, taps, dtype=torch.float64)
    lags = [s if causal or s < (taps + 1) // 2 else s - taps for s in range(taps)]
    at = {lag: k[:, s] for s, lag in enumerate(lags)}
    smoothed = smooth(k, 3, causal=causal)
    for s, lag in enumerate(lags):
        want = sum(at.get(lag + step, torch.zeros(2)) for step in (-1, 0, 1)) / 3
        torch.testing.assert_close(smoothed[:, s], want)
    assert smooth(k, 1, causal=causal) is k


def test_decay_reaches_from_one_token_to_all():
    filter = TapFilter(64, 512, squash=0.0, causal=False)
    sizes = filter.taps.detach().abs()
    assert torch.equal(distances(6, causal=False), torch.tensor([0, 1, 2, 3, 2, 1]))
    near, far = distances(512, causal=False) < 4, distances(512, causal=False) > 128
    assert sizes[0, far].max() < 1e-20 < sizes[-1, far].mean()
    assert 0.5 < sizes[-1, far].mean() / sizes[-1, near].mean() < 1.2
    lengths = decay_lengths(3, 100)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64))


@pytest.mark.parametrize("taps", [1, 2, 128, 4096])
@pytest.mark.parametrize("causal", [True, False])
def test_the_defaults_give_every_channel_something_to_train(taps, causal):
    conv = LongConv(32, taps, causal=causal)
    conv(torch.randn(1, max(taps, 8), 32)).square().sum().backward()
    trained = (conv.filter.taps.grad != 0).float().mean()
    assert trained > 0.05 and conv.skip.grad.abs().min() > 0
    if taps > 1:
        assert (conv.filter.taps.grad != 0).any(1).float().mean() > 0.9


@pytest.mark.parametrize(
    "settings", [dict(squash=0.1, init_std=0.002), dict(squash=0.05, init_std=0.02), dict(squash=-0.1), dict(squash=float("nan"))]
)
def test_a_squash_that_kills_the_taps_is_refused_with_a_remedy(settings):
    with pytest.raises(ValueError, match="squash must be from 0 to .* init_std"):
        LongConv(8, 64, **settings)


def test_a_squash_after_smooth_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="squash 0.04 with smooth 31 leaves no tap of a filter initialised with deviation 0.0625"):
        LongConv(2, 64, squash=0.04, smooth=31)


def test_a_filter_that_became_zero_warns_once_with_squash_and_init():
    conv = LongConv(4, 16, layer_index=5)
    nn.init.zeros_(conv.filter.taps)
    with pytest.warns(UserWarning, match=r"layer 5 is zero everywhere after squash 0.003 .* deviation 0.125"):
        conv(torch.randn(1, 8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conv(torch.randn(1, 8, 4))


def test_a_filter_of_zeros_without_squash_trains_and_is_not_warned_of():
    conv = LongConv(4, 16, squash=0.0)
    nn.init.zeros_(conv.filter.taps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conv(torch.randn(1, 16, 4)).square().sum().backward()
    assert conv.filter.taps.grad.abs().min() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_filters_that_are_not_finite_are_named_by_layer(value):
    conv, implicit = LongConv(4, 16, layer_index=7), ImplicitFilter(4, 16, layer_index=8)
    conv.filter.taps.data[1, 3] = value
    implicit.outer.data[0, 0] = value
    with pytest.raises(ValueError, match="layer 7 has taps that are not finite"):
        conv(torch.randn(1, 8, 4))
    with pytest.raises(ValueError, match="layer 8 has taps that are not finite"):
        implicit()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(channels=0), "channels"), (dict(taps=0), "taps"), (dict(init="zeros"), "decay or normal"), (dict(init_std=0.0), "init_std"),
        (dict(smooth=2), "smooth"), (dict(smooth=0), "smooth"), (dict(dropout=1.0), "dropout"),
    ],
)  # fmt: skip
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TapFilter(**{"channels": 4, "taps": 8, **settings})


def test_dropout_follows_from_the_seed_keeps_the_mean_and_ends_with_training():
    filter = TapFilter(50, 200, init="normal", dropout=0.25)
    a, b, other = filter(3), filter(3), filter(4)
    assert torch.equal(a, b) and not torch.equal(a, other)
    whole = filter.eval()(None)
    kept = a != 0
    torch.testing.assert_close(a[kept], (whole / 0.75)[kept])
    assert abs(float((kept.sum() / (whole != 0).sum())) - 0.75) < 0.02
    with pytest.raises(ValueError, match="dropout_seed"):
        filter.train()(None)


@pytest.mark.parametrize("causal", [True, False])
def test_an_implicit_filter_of_fewer_tokens_is_the_middle_of_the_whole(causal):
    filter = ImplicitFilter(6, 40, causal=causal).double()
    whole, part = filter(), filter(9)
    assert whole.shape == (6, 40 if causal else 79) and part.shape == (6, 9 if causal else 17)
    torch.testing.assert_close(part[:, :9], whole[:, :9])
    if not causal:
        torch.testing.assert_close(part[:, 9:], whole[:, -8:])
        assert (whole[:, 1:40] - whole[:, 40:].flip(1)).abs().max() > 1e-2
    assert torch.equal(filter(100), whole)
    gains = whole.square().sum(1).sqrt()
    assert gains.max() / gains.min() < 10  # no channel is far louder than another


@pytest.mark.parametrize("autocast", [False, True])
def test_an_implicit_filter_in_16_bits_tells_lags_apart(autocast):
    """Features of a lag, the network's last matrix product and the window are each rounded once, by 2^-9 at most; two of the three round
    their product as well. Lags that were rounded would be 16 in one at the end of this filter."""
    torch.manual_seed(0)
    filter = ImplicitFilter(8, 4096).bfloat16()
    with torch.no_grad():
        exact = copy.deepcopy(filter).double()()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = (filter.float() if autocast else filter)()
    assert float((found.double() - exact).norm() / exact.norm()) < 5 * 2**-9
