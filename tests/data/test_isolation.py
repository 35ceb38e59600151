"""Packed documents do not leak: what one of them says changes no bit of any other's loss and gradient, in training and evaluation."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import longtrain as lt
from longtrain.data.corpus import corpus_in_memory
from longtrain.data.packing import PackedDocuments
from longtrain.data.sources import Document
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.span import IGNORE_INDEX

T, V = 96, 61
PLANS = {
    "plain": None,
    "streamed": lt.Plan(chunk_tokens=16),
    "streamed, ragged chunks, segments, partly stored": lt.Plan(chunk_tokens=23, segment_layers=2, store_outputs=0.4, store_kv=0.5),
    "streamed, tensors between layers": lt.Plan(chunk_tokens=16, boundaries="tensor", store_outputs=0.0),
}


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, window=(11, None), initializer_range=0.2)
    return LanguageModel(ModelConfig(vocab_size=V, num_layers=2, **shape)).to(dtype)


def packed_batch(packing="best_fit", isolate=True):
    generator = np.random.default_rng(3)
    lengths = (37, 20, 17, 9, 2)
    documents = [Document(f"d{i}", generator.integers(0, V, n, dtype=np.uint8)) for i, n in enumerate(lengths)]
    return PackedDocuments(corpus_in_memory(documents), T, packing=packing, isolate=isolate).read_row(0)


def changed(batch, places):
    ids, labels = batch.input_ids_BT.clone(), batch.labels_BT.clone()
    ids[0, places] = (ids[0, places] + 1 + torch.arange(len(places)) % 7) % V
    labels[0, places] = ids[0, places]
    return replace(batch, input_ids_BT=ids, labels_BT=labels)


def of_others(model, batch, document):
    """Losses of every token, and gradients of the others' loss: of all parameters, and of what enters the first layer."""
    start, stop = batch.cu_seqlens[document : document + 2].tolist()
    labels = batch.labels_BT.clone()
    labels[0, start:stop] = IGNORE_INDEX
    entered = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: (output.retain_grad(), entered.append(output))[1])
    model.train().zero_grad()
    loss = model(batch.input_ids_BT, labels=labels, cu_seqlens=batch.cu_seqlens, normalizer=50).loss
    loss.backward()
    hook.remove()
    with torch.no_grad():
        losses_BT = model.eval()(batch.input_ids_BT, labels=batch.labels_BT, cu_seqlens=batch.cu_seqlens, reduction="none").loss
    others = torch.ones(T, dtype=torch.bool)
    others[start:stop] = False
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"loss": loss.detach(), "losses": losses_BT[0, others], "entry": entered[0].grad[0, others], **grads}


def differing(a, b):
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("packing, dtype", [("best_fit", torch.float32), ("concatenate", torch.bfloat16)])
@pytest.mark.parametrize("name", PLANS)
def test_changing_any_token_of_a_document_changes_no_bit_of_the_others(name, packing, dtype):
    model, batch = make_model(dtype), packed_batch(packing)
    if PLANS[name] is not None:
        lt.apply(model, PLANS[name])
    edges = batch.cu_seqlens.tolist()
    assert len(edges) == 7  # five documents and padding
    for document, (start, stop) in enumerate(zip(edges[:5], edges[1:], strict=False)):
        before = of_others(model, batch, document)
        assert before["losses"].abs().sum() > 0 and before["entry"].abs().sum() > 0
        for places in ([start], [stop - 1], list(range(start, stop))) if document == 1 else [list(range(start, stop))]:
            assert not differing(before, of_others(model, changed(batch, torch.tensor(places)), document))


@pytest.mark.parametrize("name", ["plain", "streamed"])
def test_this_comparison_sees_a_leak(name):
    model, batch = make_model(), packed_batch("concatenate")
    leaking = replace(batch, cu_seqlens=torch.tensor([0, *batch.cu_seqlens.tolist()[2:]], dtype=torch.int32))  # the first two are one
    if PLANS[name] is not None:
        lt.apply(model, PLANS[name])
    start, stop = batch.cu_seqlens[:2].tolist()
    first = [of_first(model, leaking, b, stop) for b in (leaking, changed(leaking, torch.arange(start, stop)))]
    assert not torch.equal(*first)


def of_first(model, layout, batch, stop):
    """Losses behind the first document."""
    with torch.no_grad():
        return model.eval()(batch.input_ids_BT, labels=batch.labels_BT, cu_seqlens=layout.cu_seqlens, reduction="none").loss[0, stop:]
