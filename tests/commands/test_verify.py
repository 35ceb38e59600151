"""`longtrain verify` passes on what is right, and fails on what is wrong."""

from __future__ import annotations

import pytest

from longtrain.commands import verify
from longtrain.config import load_config
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.ops.mixers import AttentionMixer
from longtrain.plan import Plan
from longtrain.stream import carry

SHAPE = dict(vocab_size=50, num_layers=2, hidden_size=24, intermediate_size=32, num_heads=4, num_kv_heads=2, initializer_range=0.1)


def rows(**changes):
    import torch

    return list(
        verify.check(LanguageModel(ModelConfig(**{**SHAPE, **changes})).double(), Plan(chunk_tokens=verify.CHUNK), 127, torch.bfloat16)
    )


@pytest.mark.parametrize(
    "changes", [dict(), dict(window=(9, None)), dict(window=(1,)), dict(attention_dropout=0.2), dict(tie_embeddings=True)]
)
def test_exact_streaming_passes_every_row(changes):
    assert all(row.good for row in rows(**changes)), rows(**changes)


HYBRID = dict(layers=("conv", "window", "linear", "attention", "delta", "lact"), num_layers=6, window=(9,), lact_chunk=10)


@pytest.mark.parametrize("conv_taps", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_hybrids_pass_every_row(conv_taps):
    """With a convolution that streams by chunks, and with one that takes two passes."""
    found = rows(**HYBRID, conv_taps=conv_taps)
    assert all(row.good for row in found), found
    assert any("segments of 2" in row.check for row in found) == (conv_taps == 5)


def test_a_hybrid_config_is_verified(tmp_path, capsys):
    layers = "model.layers=[lact, window, linear, conv, delta]"
    changes = [layers, "model.num_layers=5", "model.window=[1024]", "model.conv_taps=64", "model.lact_chunk=2048", f"output.dir={tmp_path}"]
    assert verify.run("configs/quickstart.yaml", changes) == 0
    assert "['lact', 'window', 'linear', 'conv', 'delta']" in capsys.readouterr().out


class SwappedGradients(carry.KVCarry):
    def take_grad(self, span):
        return super().take_grad(span)[::-1]


class ForgetsThePast(carry.KVCarry):
    """Keys older than one chunk get no gradient."""

    def take_grad(self, span):
        dk, dv = super().take_grad(span)
        return dk * (span.start > 0), dv


class RoundsTheCarry(carry.KVCarry):
    def append(self, span, k, v):
        super().append(span, k * (1 + 1e-9), v)


@pytest.mark.parametrize("wrong", [SwappedGradients, ForgetsThePast, RoundsTheCarry])
def test_planted_faults_are_found(wrong, monkeypatch):
    monkeypatch.setitem(carry.CARRIES, AttentionMixer, wrong)
    assert not all(row.good for row in rows())


def test_a_config_with_a_disk_is_verified_with_everything_on_it(disk, capsys):
    disk = f"memory.disk={{path: {disk}, budget: 1GiB}}"
    assert verify.run("configs/quickstart.yaml", [disk]) == 0
    plan, _ = verify.shrink_plan(*load_config("configs/quickstart.yaml", [disk]))
    assert plan.offload.outputs.disk == plan.offload.inputs.disk == 1.0
    assert capsys.readouterr().out.endswith("exact\n")
