"""A buffer that slides holds the right tokens, and no more of them than it says."""

from __future__ import annotations

import pytest
import torch

from longtrain.ops.mixers import AttentionMixer
from longtrain.span import Layout, Span, chunk_spans
from longtrain.stream.carry import KVCarry
from longtrain.stream.sliding import Sliding, capacity

TOKENS = 101
WHOLE = torch.arange(TOKENS * 3.0).view(1, TOKENS, 3)


@pytest.mark.parametrize("chunk", [1, 7, 32, 100, TOKENS, 150])
@pytest.mark.parametrize("window", [0, 1, 6, 40, 200])
def test_what_is_needed_is_held_forwards_and_backwards(chunk, window):
    spans = chunk_spans(TOKENS, chunk)
    reach = max(span.stop - max(0, span.start - window) for span in spans)
    for step in ("append", "prepend"):
        sliding = Sliding(reach, TOKENS)
        for i, span in enumerate(spans if step == "append" else reversed(spans)):
            part = WHOLE[:, span.slice()].clone()
            if step == "append":
                needed = Span(max(0, span.start - window), span.stop)
                sliding.append(span, part, needed.start)
            else:
                needed = Span(span.start, min(TOKENS, span.stop + window))
                sliding.prepend(span, part, needed.stop)
            assert torch.equal(sliding[needed], WHOLE[:, needed.slice()]), (step, i)
            assert sliding._buffer.shape[1] <= capacity(reach, TOKENS)


@pytest.mark.parametrize("mixer, most", [
    (AttentionMixer(window_size=(9, 0)), 40),
    (AttentionMixer(documents=Layout.make(TOKENS, [0, 20, 37, 60, TOKENS])), 75),
    (AttentionMixer(), TOKENS),
    (AttentionMixer(window_size=(9, 0), sink_tokens=1), TOKENS),
], ids=["window", "documents", "full", "sinks"])  # fmt: skip
def test_a_carry_holds_what_a_chunk_sees(mixer, most):
    """A window of 10 in chunks of 16 reaches back one chunk: 32 tokens, and a quarter more. The longest document has 41 tokens."""
    spans = chunk_spans(TOKENS, 16)
    carry = KVCarry(mixer, spans)
    for span in spans:
        carry.append(span, *(torch.randn(1, len(span), 2, 4) for _ in range(2)))
        assert carry._k_BSKD._buffer.shape[1] <= most
    assert carry.slides == (most < TOKENS)
