"""Memory of a step by family: tensors alive at the peak, in chunks of a sixteenth of the sequence against the whole at once."""

import hf_families
import pytest
import torch

import longtrain as lt
from longtrain.stream.work import Alive, made

TOKENS = 1024


def peak_bytes(family, chunk_tokens):
    model = hf_families.build(family, hidden_size=64, intermediate_size=192, num_hidden_layers=2, max_position_embeddings=TOKENS).float()
    ids = torch.randint(3, hf_families.VOCAB, (1, TOKENS))
    lt.apply(model, lt.Plan(chunk_tokens=chunk_tokens, loss_chunk_tokens=64, store_outputs=0.0))
    model(input_ids=ids[:, :64], labels=ids[:, :64]).loss.backward()  # gradients are there from the first step on
    with Alive() as alive:
        model(input_ids=ids, labels=ids).loss.backward()
    return alive.most


TWELVE = ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_neox", "cohere", "olmo2", "glm4", "mixtral", "gpt_oss"]


@pytest.mark.slow
@pytest.mark.parametrize("family", TWELVE)
def test_chunks_of_a_sixteenth_halve_the_peak(family):
    whole, chunked = peak_bytes(family, TOKENS), peak_bytes(family, TOKENS // 16)
    assert chunked > TOKENS * 64 * 4 * 2, "the hidden states of two layers at least: is anything counted?"
    assert chunked <= 0.5 * whole, f"{chunked / 2**20:.1f} of {whole / 2**20:.1f} MiB"


class Made(Alive):
    """Also the shapes of the matrices that operations made, views left out."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.shapes |= {tuple(sorted(t.shape)) for t in made(out, args, kwargs) if t.ndim == 2}
        return out


def test_lora_forms_no_weight_gradient():
    """Neither its shape nor its bytes ever appear; with all weights trained they do."""
    peft = pytest.importorskip("peft")
    runs = {}
    for lora in (False, True):
        model = hf_families.build("llama", hidden_size=64, intermediate_size=192).float()
        frozen = {tuple(sorted(p.shape)) for p in model.parameters() if p.ndim == 2}
        layer_bytes = sum(p.nbytes for p in model.model.layers[0].parameters() if p.ndim == 2)
        if lora:
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        lt.apply(model, lt.Plan(chunk_tokens=12, loss_chunk_tokens=12))
        ids = torch.randint(3, hf_families.VOCAB, (1, 40))
        for _ in range(2):  # gradients are there from the first step on
            with Made() as runs[lora]:
                model(input_ids=ids, labels=ids).loss.backward()
        assert all((p.grad is None) == ("lora_" not in name) for name, p in model.named_parameters()) or not lora
    assert frozen <= runs[False].shapes, "all weights' gradients were formed, in one shape or its transpose"
    assert not frozen & runs[True].shapes
    assert runs[True].most <= runs[False].most - layer_bytes, "a layer's sums of weight gradients are not there either"
