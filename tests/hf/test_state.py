"""Hybrid models: convolutions and recurrent states carried through the layer's own cache, and what cannot be."""

import hf_families
import pytest
import torch
from torch import nn

import longtrain as lt
from longtrain.double import InDouble
from longtrain.hf.state import ChunkCache, States
from longtrain.span import Layout, Span

one_row = lambda: dict(hf_families.batches())["one row"]


@pytest.mark.parametrize("family, chunk_tokens", [
    ("lfm2", 1), ("lfm2", 2), pytest.param("lfm2", 28, marks=pytest.mark.slow), pytest.param("qwen3_next", 7, marks=pytest.mark.slow),
    pytest.param("mamba2", 3, marks=pytest.mark.slow),
])
def test_chunks_shorter_than_the_kernel_and_of_one_token(family, chunk_tokens):
    model, batch = hf_families.build(family), dict(hf_families.batches())["left-padded"]
    own = hf_families.gradients(model, batch, use_cache=False)
    bound = hf_families.bound(model, batch, own)
    report = lt.apply(model, lt.Plan(chunk_tokens=chunk_tokens, loss_chunk_tokens=8))
    report.check_replay()
    for _ in range(2):
        assert hf_families.difference(hf_families.gradients(model, batch), own) <= bound


def test_frozen_weights_pass_the_gradient_of_the_state_on():
    """Nothing but the embedding is trained: its gradient goes through all states, and the layers' nodes hang on the hidden states alone."""
    model, batch = hf_families.build("lfm2"), one_row()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed" in name)
    own = hf_families.gradients(model, batch, use_cache=False)
    lt.apply(model, lt.Plan(chunk_tokens=8, loss_chunk_tokens=8))
    assert hf_families.difference(hf_families.gradients(model, batch), own) <= 1e-6


def test_the_first_layers_weights_alone():
    """Hidden states that want no gradient: the states still carry one to the weights of earlier chunks."""
    model, batch = hf_families.build("lfm2"), one_row()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0.conv" in name)
    own = hf_families.gradients(model, batch, use_cache=False)
    assert len(own) == 4
    lt.apply(model, lt.Plan(chunk_tokens=8, loss_chunk_tokens=8))
    assert hf_families.difference(hf_families.gradients(model, batch), own) <= 1e-6


def test_generation_and_evaluation_between_steps():
    model, batch = hf_families.build("lfm2"), one_row()
    own = hf_families.gradients(model, batch, use_cache=False)
    expected = model.generate(batch["input_ids"][:, :9], max_new_tokens=5, do_sample=False)
    lt.apply(model, lt.Plan(chunk_tokens=8, loss_chunk_tokens=8))
    assert torch.equal(model.generate(batch["input_ids"][:, :9], max_new_tokens=5, do_sample=False), expected)
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(float(own["loss"]), rel=1e-6)
    assert hf_families.difference(hf_families.gradients(model, batch), own) <= 1e-6


def test_layers_with_states_are_no_part_of_a_segment():
    model = hf_families.build("lfm2")
    with pytest.raises(ValueError, match=r"layers.0 carries states from chunk to chunk.*use Plan\(segment_layers=1\)"):
        lt.apply(model, lt.Plan(chunk_tokens=8, segment_layers=2))
    assert not any("forward" in module.__dict__ for module in model.modules())


EDGES = (0, 1, 9, 10, 20, 29)
"""Documents of one token, and in chunks of 8 one whose last token a chunk begins with: a single token would be taken for decoding."""


def in_rows(model, batch):
    """Loss and gradients of each document in a row of its own, added up."""
    count = int((batch["labels"] != -100).sum())
    total = {}
    for first, behind in zip(EDGES, EDGES[1:], strict=False):
        alone = {name: batch[name][:, first:behind] for name in ("input_ids", "labels")}
        part = hf_families.gradients(model, alone, use_cache=False, num_items_in_batch=count)
        total = {name: total.get(name, 0) + value for name, value in part.items()}
    return total


@pytest.mark.parametrize("family", [
    "lfm2", *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen3_next", "bamba", "mamba2", "falcon_h1")),
])
def test_documents_inside_a_row(family):
    with InDouble():
        model, batch = hf_families.build(family), one_row()
        batch["labels"] = batch["labels"].clone()
        batch["labels"][:, EDGES[:-1]] = -100  # nothing before them predicts them
        own = in_rows(model, batch)
        lt.apply(model, lt.Plan(chunk_tokens=8, loss_chunk_tokens=8)).check_replay()
        cu = torch.tensor(EDGES, dtype=torch.int32)
        positions = Layout(29, EDGES).positions()[None]
        packed = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, position_ids=positions)
        for _ in range(2):
            assert hf_families.difference(hf_families.gradients(model, batch, **packed), own) <= 1e-12
        with pytest.raises(ValueError, match="give cu_seq_lens_q and cu_seq_lens_k with it"):
            model(**batch, seq_idx=positions)


@pytest.mark.slow
def test_a_state_that_is_edited_in_place_is_refused():
    model = hf_families.build("mamba2")
    lt.apply(model, lt.Plan(chunk_tokens=7))
    with pytest.raises(ValueError, match="no chunk, the last one too, has a single token"):
        model(**one_row())


def test_a_cache_that_is_asked_for_something_else():
    model = hf_families.build("minimax")
    report = lt.apply(model, lt.Plan(chunk_tokens=8, layer_fallback="unstreamed"))
    assert "it asks its cache for get_linear_cache, which is not carried" in str(report)


def test_a_layer_that_keeps_something_beside_its_cache_is_refused():
    """The proof sees it: here the convolution's last input is forgotten where a chunk ends."""
    model = hf_families.build("lfm2")
    conv = model.model.layers[0].conv
    conv.__class__ = type("Forgetful", (type(conv),), {"forward": forgetful})
    with pytest.raises(ValueError, match="layers.0 cannot be streamed: its output in chunks of 5 differs"):
        lt.apply(model, lt.Plan(chunk_tokens=8))


def forgetful(self, hidden_states, past_key_values=None, **kwargs):
    if past_key_values is not None and past_key_values.before:
        past_key_values.before["conv", 0][..., -1:].zero_()
        past_key_values._versions = {("conv", 0): past_key_values.before["conv", 0]._version}
    return super(type(self), self).forward(hidden_states, past_key_values=past_key_values, **kwargs)


@pytest.mark.parametrize("keep", [True, False])
def test_states_are_kept_for_the_backward_pass_alone(keep):
    states, conv = States(keep=keep), nn.Conv1d(3, 3, 4, groups=3)
    spans = [Span(0, 5), Span(5, 6), Span(6, 11)]
    x = torch.randn(2, 3, 11)
    with torch.no_grad():
        expected = nn.functional.pad(x, (3, 0))
        parts = []
        for span in spans:
            cache = ChunkCache(states.enter(span, ()))
            whole = cache.update_conv_state(x[..., span.slice()], 0, conv_kernel_size=4)
            parts.append(conv(nn.functional.pad(whole, (3, 0)))[..., -len(span) :])
            states.leave(span, cache.after, x)
        assert torch.allclose(torch.cat(parts, -1), conv(expected), atol=1e-6)
    assert set(states._at) == ({0, 5, 6, 11} if keep else {0, 11})
    assert ChunkCache({}).get_recurrent_state(0) is None and ChunkCache({}).get_conv_state(0) is None
