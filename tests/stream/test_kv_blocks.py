"""Keys and values in blocks: plain autograd's gradients, the same bits wherever the blocks lie, and only a few of them on the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import longtrain as lt
from longtrain.commands import verify
from longtrain.config import load_config
from longtrain.config.memory import MemoryConfig
from longtrain.stream.kv_blocks import BlockKVCarry
from tests.stream.conftest import VOCAB, assert_streamed_equals_plain, loss_and_grads, make_model
from tests.stream.test_offload import DISK, HOST, MIXED, assert_same_bits, inputs, tiers  # noqa: F401

TOKENS = 70


@pytest.mark.parametrize("settings", [
    dict(chunk_tokens=16, kv_block_tokens=16),
    dict(chunk_tokens=8, kv_block_tokens=24, store_outputs=0.45),
    dict(chunk_tokens=16, kv_block_tokens=32, store_outputs=0.0, segment_layers=3),
    dict(chunk_tokens=7, kv_block_tokens=700, store_kv=1.0),
], ids=["a chunk", "three chunks, parts of outputs", "a segment, no outputs", "longer than the sequence"])  # fmt: skip
@pytest.mark.parametrize("model", [dict(), dict(window=(None, 13, None)), dict(num_kv_heads=4), dict(num_kv_heads=1)])
def test_gradients_are_plain_autograd_s(float64, settings, model):
    assert_streamed_equals_plain(make_model(layers=3, **model), lt.Plan(**settings), inputs())


@pytest.mark.parametrize("tokens", [2, 15, 16, 17, 40, 64])
def test_lengths_around_the_chunk_and_the_block(float64, tokens):
    assert_streamed_equals_plain(make_model(), lt.Plan(chunk_tokens=16, kv_block_tokens=32), inputs(tokens))


@pytest.mark.parametrize("edges, blocks", [([0, 5, TOKENS], True), ([0, 20, 61, TOKENS], False)], ids=["a long one", "several"])
def test_packed_documents(float64, monkeypatch, edges, blocks):
    """Blocks where a chunk sees as far as the first one; where none does, the carry slides as it does without."""
    made = []
    monkeypatch.setattr(BlockKVCarry, "append", lambda self, *a, append=BlockKVCarry.append: (made.append(self), append(self, *a)))
    call = inputs(cu_seqlens=torch.tensor(edges, dtype=torch.int32))
    assert_streamed_equals_plain(make_model(), lt.Plan(chunk_tokens=8, kv_block_tokens=16), call)
    assert bool(made) == blocks


def test_two_micro_batches_at_once(float64):
    model, calls = make_model(), [inputs(), inputs(40)]
    assert_streamed_equals_plain(model, lt.Plan(chunk_tokens=16, kv_block_tokens=32), *calls)


def test_a_batch_of_two(float64):
    ids = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    assert_streamed_equals_plain(make_model(), lt.Plan(chunk_tokens=16, kv_block_tokens=32), dict(input_ids=ids, labels=ids))


@pytest.mark.parametrize("kv", [DISK, HOST, MIXED], ids=["disk", "host", "every tier"])
@pytest.mark.parametrize("plan", [
    lt.Plan(chunk_tokens=8, kv_block_tokens=16),
    lt.Plan(chunk_tokens=8, kv_block_tokens=24, segment_layers=3, store_outputs=0.3),
], ids=["layers", "segments"])  # fmt: skip
def test_bits_do_not_depend_on_where_the_blocks_lie(plan, kv, tiers):  # noqa: F811
    offload = lt.Offload(kv=kv, inputs=DISK, gradients=MIXED, outputs=HOST, **tiers)
    report = assert_same_bits(make_model(layers=3, window=(None, 13, None)), plan, offload, inputs())
    assert all(report.store.regions[tier].most > 0 for tier in ("host", "disk"))


def test_dropout_is_that_of_the_whole(tiers):  # noqa: F811
    model = make_model(attention_dropout=0.2)
    assert_same_bits(model, lt.Plan(chunk_tokens=8, kv_block_tokens=16), lt.Offload(kv=DISK, **tiers), inputs())


def test_staging_of_less_than_a_chunk_s_needs(tiers):  # noqa: F811
    """One extent at a time: slow, and right."""
    offload = lt.Offload(kv=DISK, inputs=DISK, gradients=DISK, outputs=DISK, **{**tiers, "staging_bytes": 1 << 17})
    assert_same_bits(make_model(layers=3, hidden_size=96), lt.Plan(chunk_tokens=16, kv_block_tokens=32), offload, inputs(200))


def test_only_a_few_blocks_are_on_the_device(tiers, monkeypatch):  # noqa: F811
    """Bytes of keys, values and their sums that the carry was handed at one time, beside the store's staging."""
    most, held = 0, BlockKVCarry.adjoint_blocks

    def counted(self, span):
        nonlocal most
        for block in held(self, span):
            own = [] if self._own is None else [self._own.dk_BSKD, self._own.dv_BSKD]
            tensors = {t.data_ptr(): t.nbytes for t in (block.k_BSKD, block.v_BSKD, block.dk_BSKD, block.dv_BSKD, *own)}
            most = max(most, sum(tensors.values()))
            yield block

    monkeypatch.setattr(BlockKVCarry, "adjoint_blocks", counted)
    model, tokens = make_model(), 240
    offload = lt.Offload(kv=DISK, **{**tiers, "staging_bytes": 1 << 18})
    report = lt.apply(model, lt.Plan(chunk_tokens=8, kv_block_tokens=16, offload=offload))
    loss_and_grads(model, inputs(tokens))
    token = 2 * 2 * 6 * 4  # bytes of a token's keys and values; its sums take as many
    assert 0 < most <= 4 * 16 * token < 2 * tokens * token / 4
    report.undo()


@pytest.mark.parametrize("settings, match", [
    (dict(kv_block_tokens=24), r"kv_block_tokens must be a multiple of chunk_tokens \(16\), found 24"),
    (dict(kv_block_tokens=0), "kv_block_tokens must be an integer of at least 1"),
    (dict(kv_block_tokens=1.5), "kv_block_tokens must be an integer of at least 1"),
])  # fmt: skip
def test_lengths_that_are_none(settings, match):
    with pytest.raises(ValueError, match=match):
        lt.Plan(chunk_tokens=16, **settings)


def test_verify_keeps_the_blocks():
    config, where = load_config("configs/quickstart.yaml")
    plan, _ = verify.shrink_plan(replace(config, memory=MemoryConfig(chunk_tokens=512, kv_block_tokens=4096)), where)
    assert plan.kv_block_tokens == 2 * plan.chunk_tokens
