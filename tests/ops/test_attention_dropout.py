"""Attention dropout: a mask that is a function of global positions, and random enough."""

import pytest
import torch

from longtrain.ops.attention import attention
from longtrain.ops.attention.interface import checked_call
from longtrain.ops.attention.mask import dropout_keep
from longtrain.ops.mixers import AttentionMixer


def keep(B=1, H=1, T=512, S=512, q_start=0, k_start=0, seed=3, p=0.5, head_offset=0):
    x = torch.zeros(B, T, H, 1)
    k = torch.zeros(B, S, H, 1)
    call = checked_call(x, k, k, causal=False, dropout_p=p, dropout_seed=seed, head_offset=head_offset)
    positions = torch.arange(q_start, q_start + T), torch.arange(k_start, k_start + S)
    return dropout_keep(call, torch.arange(B), torch.arange(H), *positions)


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62])
def test_the_right_fraction_survives(p, seed):
    kept = keep(B=2, H=2, p=p, seed=seed).double()
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(float(kept.mean()) - (1 - p)) < 4.5 * deviation
    # Rows and columns alone, too: no row or column is special.
    for axis in (2, 3):
        spread = kept.mean(axis).std() / (p * (1 - p) / 512) ** 0.5
        assert 0.9 < float(spread) < 1.1


def test_neighbours_are_independent():
    kept = keep()
    bound = 5 / kept.numel() ** 0.5
    pairs = {
        "next key": (kept[..., 1:], kept[..., :-1]),
        "next query": (kept[:, :, 1:], kept[:, :, :-1]),
        "diagonal": (kept[:, :, 1:, 1:], kept[:, :, :-1, :-1]),
        "transposed": (kept, kept.transpose(2, 3)),
        "64 keys on": (kept[..., 64:], kept[..., :-64]),
        "next seed": (kept, keep(seed=4)),
        "next head": (kept, keep(head_offset=1)),
        "next batch": (keep(B=2)[0], keep(B=2)[1]),
        "far away": (kept, keep(q_start=2**20, k_start=2**20)),
    }
    for name, (a, b) in pairs.items():
        assert abs(correlation(a, b)) < bound, name


def test_heads_of_a_process_are_the_models_heads():
    assert torch.equal(keep(H=4)[:, 2:], keep(H=2, head_offset=2))


def test_groups_of_a_process_s_heads_are_dropped_as_the_whole_is():
    mixer = AttentionMixer(dropout_p=0.5, dropout_seed=3, head_offset=2)
    qkv = [torch.randn(1, 9, heads, 4, dtype=torch.float64) for heads in (4, 2, 2)]
    whole = mixer(*qkv)
    for heads, part, inputs in mixer.by_group(*qkv):
        torch.testing.assert_close(part(*inputs), whole[:, :, heads], rtol=1e-13, atol=1e-13)


def test_positions_are_global():
    assert torch.equal(keep()[:, :, 100:200, 50:90], keep(T=100, S=40, q_start=100, k_start=50))


def test_the_mean_over_seeds_is_attention_without_dropout():
    q, k, v = (torch.randn(1, 20, 2, 8) for _ in range(3))
    plain = attention(q, k, v, causal=True)
    runs = torch.stack([attention(q, k, v, causal=True, dropout_p=0.2, dropout_seed=seed) for seed in range(2000)])
    error = (runs.mean(0) - plain).abs() / (runs.std(0) / 2000**0.5 + 1e-6)
    assert float(error.max()) < 5
    assert (runs[0] != runs[1]).any()


def test_lse_is_without_dropout():
    q, k, v = (torch.randn(1, 20, 2, 8) for _ in range(3))
    _, plain = attention(q, k, v, causal=True, return_lse=True)
    _, dropped = attention(q, k, v, causal=True, return_lse=True, dropout_p=0.5, dropout_seed=1)
    assert torch.equal(plain, dropped)
