"""One packed row through a transformers model: its loss and gradients are those of every document alone, streamed or not."""

import hf_families
import pytest
import torch
import torch.nn.functional as F

import longtrain as lt
from longtrain.hf.call import logits_at, packed_loss, positions
from longtrain.span import Layout
from tests.hf.test_families import UPCASTS

EDGES = (0, 7, 8, 9, 23, 31)
"""Documents, two of one token, and padding that is longer than most of them."""
PADDING = 23


def row():
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, hf_families.VOCAB, (1, EDGES[-1]), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100  # a prompt
    labels[:, 12:15] = -100
    labels[:, PADDING:] = -100
    return ids, labels, torch.tensor(EDGES, dtype=torch.int32)


def alone(model, ids, labels):
    """The loss of each predicted token ``[1, T]``, every document by itself in a batch of its own."""
    losses = torch.zeros(labels.shape, dtype=torch.float64)
    for a, b in zip(EDGES, EDGES[1:], strict=False):
        if b <= PADDING:
            logits = model(input_ids=ids[:, a:b], use_cache=False).logits
            losses[:, a : b - 1] = F.cross_entropy(logits[0, :-1], labels[0, a + 1 : b], reduction="none", ignore_index=-100)
    return losses


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "cohere"])
@pytest.mark.parametrize(
    "plan",
    [None, lt.Plan(chunk_tokens=8, loss_chunk_tokens=5), lt.Plan(chunk_tokens=64, loss_chunk_tokens=64)],
    ids=["plain", "streamed", "one chunk"],
)
def test_the_loss_of_a_packed_row_is_that_of_its_documents(family, plan):
    model = hf_families.build(family)
    ids, labels, cu = row()
    if plan is not None:  # eager softmax is float32 in every dtype; that longtrain's attention is the family's own is tested elsewhere
        model.set_attn_implementation("longtrain")
    expected = alone(model, ids, labels)
    wanted, expected = gradients(model, expected.sum() / 17), expected.detach()
    if plan is not None:
        lt.apply(model, plan)
    each = packed_loss(model, ids, labels, cu, reduction="none").detach()
    assert float((each - expected).norm() / expected.norm()) <= UPCASTS
    count = int((expected != 0).sum())
    assert float(packed_loss(model, ids, labels, cu).detach()) == pytest.approx(float(expected.sum()) / count, rel=UPCASTS)
    found = gradients(model, packed_loss(model, ids, labels, cu, normalizer=17))
    assert float((found - wanted).norm() / wanted.norm()) <= UPCASTS


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_of_some_positions_are_those_of_all_logits(family):
    model = hf_families.build(family).eval()
    ids, _, cu = row()
    documents, at = Layout.make(ids.shape[1], cu), torch.tensor([4, 22, 30])
    with torch.no_grad():
        whole = model(input_ids=ids, position_ids=documents.positions()[None], use_cache=False).logits[0, at]
        lt.apply(model, lt.Plan(chunk_tokens=8, loss_chunk_tokens=8))
        found = logits_at(model, ids, documents, at)
    assert found.shape == whole.shape and float((found - whole).norm() / whole.norm()) <= UPCASTS


def test_padding_gets_no_position_beyond_those_of_the_documents():
    assert positions(Layout.make(EDGES[-1], EDGES), True)[0].tolist() == [*range(7), 0, 0, *range(14), *range(8)]
    assert positions(Layout.make(31, [0, 5, 31]), False)[0].tolist() == [*range(5), *range(26)]
    assert max(positions(Layout.make(31, [0, 5, 31]), True)[0].tolist()) == 4
