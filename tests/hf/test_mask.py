"""Masks read off transformers' own mask functions, against the masks it makes of them."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    create_causal_mask,
    or_masks,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from longtrain.hf.mask import longtrain_mask

TOKENS = 23


def both(mask_function=causal_mask_function, *, batch=2, queries=TOKENS, keys=TOKENS, q_offset=0, kv_offset=0, attention_mask=None):
    arguments = dict(
        batch_size=batch,
        q_length=queries,
        kv_length=keys,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
    )
    return longtrain_mask(**arguments), sdpa_mask(**arguments, allow_is_causal_skip=False)


def padding(*valid):
    mask = torch.zeros(len(valid), TOKENS, dtype=torch.bool)
    for row, (start, stop) in enumerate(valid):
        mask[row, start:stop] = True
    return mask


def packed(*documents):
    return torch.cat([torch.arange(n) for n in documents])[None]


FUNCTIONS = {
    "causal": causal_mask_function,
    "window": sliding_window_causal_mask_function(5),
    "window of one token": sliding_window_causal_mask_function(1),
    "window wider than the sequence": sliding_window_causal_mask_function(100),
    "chunked": chunked_causal_mask_function(6, torch.tensor([0, 0])),
    "chunked after padding": chunked_causal_mask_function(6, torch.tensor([3, 0])),
    "two-sided": lambda b, h, q, k: q >= 0,
    "two-sided window": sliding_window_bidirectional_mask_function(4),
}


@pytest.mark.parametrize("attention_mask", [None, padding((0, TOKENS), (4, TOKENS)), padding((0, 9), (3, 20)), padding((0, 0), (0, 1))],
                         ids=["no padding", "left", "both ends", "empty row"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mask_is_described_exactly(name, attention_mask):
    mask, expected = both(FUNCTIONS[name], attention_mask=attention_mask)
    mask.check()
    assert torch.equal(mask.dense(2), expected.expand(2, 1, TOKENS, TOKENS))


@pytest.mark.parametrize("queries, q_offset, kv_offset", [(1, TOKENS - 1, 0), (4, TOKENS - 4, 0), (3, TOKENS + 2, 5), (1, 0, 0)])
@pytest.mark.parametrize("name", ["causal", "window"])
def test_queries_behind_a_cache(name, queries, q_offset, kv_offset):
    keys = q_offset + queries - kv_offset
    mask, expected = both(FUNCTIONS[name], queries=queries, keys=keys, q_offset=q_offset, kv_offset=kv_offset)
    assert torch.equal(mask.dense(2), expected.expand(2, 1, queries, keys))


@pytest.mark.parametrize("window", [None, 4])
def test_packed_rows_become_documents(window):
    config = LlamaConfig(attn_implementation="longtrain", num_attention_heads=2, hidden_size=8, intermediate_size=8, vocab_size=8)
    positions = torch.cat([packed(5, 1, 17), packed(23)])
    embeds = torch.zeros(2, TOKENS, 8)
    restrict = None if window is None else (lambda b, h, q, k: q - k < window)
    arguments = dict(inputs_embeds=embeds, attention_mask=None, past_key_values=None, position_ids=positions, and_mask_function=restrict)
    mask = create_causal_mask(config, **arguments)
    config._attn_implementation = "sdpa"
    assert torch.equal(mask.dense(2), create_causal_mask(config, **arguments))
    assert [row.documents.edges for row in mask.rows] == [(0, 5, 6, 23), (0, 23)]
    assert mask.window == (-1 if window is None else window - 1, -1)


@pytest.mark.parametrize("wrong", [
    or_masks(causal_mask_function, lambda b, h, q, k: (k < 7) & (q >= 0)),  # a prefix that sees itself
    or_masks(causal_mask_function, lambda b, h, q, k: (q // 4 == 2) & (k // 4 == 2)),  # a block of image tokens
    and_masks(causal_mask_function, lambda b, h, q, k: (q - k) % 3 == 0),  # strides
    and_masks(causal_mask_function, lambda b, h, q, k: ~((q == 20) & (k == 2))),  # one pair
    lambda b, h, q, k: q < 0,  # nothing
], ids=["prefix", "image block", "stride", "one pair", "nothing"])
def test_other_masks_are_refused_when_used(wrong):
    mask, _ = both(wrong)
    with pytest.raises(ValueError, match="cannot be honoured"):
        mask.check()


def test_a_wrong_pair_of_a_long_mask_is_found_by_sampling():
    wrong = and_masks(causal_mask_function, lambda b, h, q, k: ~((q > 700) & (k < 300)))
    mask, _ = both(wrong, queries=1000, keys=1000)
    with pytest.raises(ValueError, match="cannot be honoured"):
        mask.check()


def test_padding_inside_a_row_is_refused():
    hole = padding((0, TOKENS), (0, TOKENS))
    hole[1, 9] = False
    with pytest.raises(ValueError, match="row 1 has padding inside.*pad at the ends"):
        both(attention_mask=hole)


def test_cu_seqlens_add_documents():
    mask, _ = both(FUNCTIONS["window"], batch=1)
    assert mask.with_documents(torch.tensor([0, 4, TOKENS])).rows[0].documents.edges == (0, 4, TOKENS)
    two_rows, _ = both(attention_mask=padding((0, TOKENS), (4, TOKENS)))
    with pytest.raises(ValueError, match="batch of 2 different rows"):
        two_rows.with_documents(torch.tensor([0, TOKENS]))
    with pytest.raises(ValueError, match="rise from 0"):
        mask.with_documents(torch.tensor([0, 4, 9]))
