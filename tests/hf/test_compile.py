"""torch.compile of a streamed model's pieces: the same gradients, and nothing is compiled again after the second step."""

import hf_families
import pytest
import torch
from torch._dynamo.utils import counters

import longtrain as lt

TOKENS = 32


def compiled(model, plan, backend="aot_eager"):
    """The model streamed, its layers' pieces (norms, attention, MLP) compiled for the chunk's shape."""
    lt.apply(model, plan)
    for layer in next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
        for piece in layer.children():
            piece.compile(backend=backend, dynamic=False)


@pytest.mark.parametrize("family, plan", [
    ("llama", lt.Plan(chunk_tokens=16, loss_chunk_tokens=8)),
    pytest.param("qwen3", lt.Plan(chunk_tokens=8, loss_chunk_tokens=8, store_outputs=0.5), marks=pytest.mark.slow),
    pytest.param("gemma2", lt.Plan(chunk_tokens=8, loss_chunk_tokens=8, boundaries="tensor"), marks=pytest.mark.slow),
    pytest.param("gpt_neox", lt.Plan(chunk_tokens=12, segment_layers=2, loss_chunk_tokens=8), marks=pytest.mark.slow),
    pytest.param("phi3", lt.Plan(chunk_tokens=32, loss_chunk_tokens=8), marks=pytest.mark.slow),
])
def test_pieces_are_compiled_once(family, plan):
    torch._dynamo.reset()
    model = hf_families.build(family, num_hidden_layers=2)
    ids = torch.randint(3, hf_families.VOCAB, (4, 1, TOKENS))
    packed = torch.cat([torch.arange(11), torch.arange(TOKENS - 11)])[None]
    batches = [dict(input_ids=row, labels=row, **(dict(position_ids=packed) if step % 2 else {})) for step, row in enumerate(ids)]
    own = [hf_families.gradients(model, batch, use_cache=False) for batch in batches]
    compiled(model, plan)
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for step, (batch, expected) in enumerate(zip(batches, own, strict=True)):
            if step == 2:
                graphs = counters["stats"]["unique_graphs"]
                assert graphs >= 4, "norm, attention's two sides and MLP"
            with torch._dynamo.config.patch(error_on_recompile=step >= 2):
                error = hf_families.difference(hf_families.gradients(model, batch), expected)
            assert error <= 1e-6, f"step {step}: {error:.1e}"
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


@pytest.mark.slow
def test_under_autocast():
    torch._dynamo.reset()
    model, batch = hf_families.build("llama", num_hidden_layers=2).float(), dict(hf_families.batches())["one row"]

    def step():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}

    own = step()
    compiled(model, lt.Plan(chunk_tokens=8, loss_chunk_tokens=8))
    for number in range(4):
        with torch._dynamo.config.patch(error_on_recompile=number >= 2):
            assert hf_families.difference(step(), own) <= 0.03  # bfloat16 on both sides: 8 bits
    torch._dynamo.reset()
