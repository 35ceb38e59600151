"""Two gloo processes: DDP and FSDP2 around a streamed transformers model, sharded before or after `lt.apply`, by as few collectives."""

from collections import Counter

import hf_families
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import longtrain as lt
from tests.processes import run_ranks
from tests.stream.test_distributed import CountCollectives

WORLD, CLOSE = 2, 1e-6
PLAN = lt.Plan(chunk_tokens=8, loss_chunk_tokens=8)


def batch(rank):
    ids = torch.randint(3, hf_families.VOCAB, (1, 29), generator=torch.Generator().manual_seed(rank))
    labels = ids.clone()
    labels[:, : 5 + 9 * rank] = -100
    return dict(input_ids=ids, labels=labels)


def targets():
    return sum(int((batch(rank)["labels"][:, 1:] != -100).sum()) for rank in range(WORLD))


def one_process(family):
    model = hf_families.build(family)
    for rank in range(WORLD):
        model(**batch(rank), use_cache=False, num_items_in_batch=targets()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def shard(model, segment_layers=1):
    layers = list(model.base_model.layers)
    for at in range(0, len(layers), segment_layers):
        unit = layers[at : at + segment_layers]
        fully_shard(unit if len(unit) > 1 else unit[0])
    fully_shard(model)


def step(model, module, rank):
    """Gradients, whole; both average over ranks: the local sum over the global count, times the number of ranks."""
    module(**batch(rank), num_items_in_batch=targets() / WORLD).loss.backward()
    return {name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for name, p in model.named_parameters()}


def assert_close(grads, expected):
    for name, value in expected.items():
        error = float((grads[name] - value).norm() / value.norm())
        assert error <= CLOSE, f"{name}: {error:.1e}"


def ddp(rank, world):
    model = hf_families.build("llama")
    lt.apply(model, PLAN)
    assert_close(step(model, DistributedDataParallel(model), rank), one_process("llama"))


def fsdp(rank, world, family, first):
    """`fully_shard` before or after `lt.apply`; afterwards `undo` leaves a sharded model that trains as before."""
    model, expected = hf_families.build(family), one_process(family)
    if first == "shard":
        shard(model)
    report = lt.apply(model, PLAN)
    if first == "apply":
        shard(model)
    for _ in range(2):
        assert_close(step(model, model, rank), expected)
        model.zero_grad()
    report.undo()
    assert all(hasattr(p, "device_mesh") for p in model.parameters())
    assert_close(step(model, model, rank), expected)
    model.zero_grad()
    lt.apply(model, PLAN)
    assert_close(step(model, model, rank), expected)


def collectives(rank, world):
    """One gather for each segment and pass and one reduce-scatter, whatever the number of chunks; one more of each for the root."""
    layers, expected = 4, None
    for segment_layers in (1, 2):
        for chunk_tokens in (4, 8, 29, None):
            for first in ("shard", "apply") if chunk_tokens else ("shard",):
                model = hf_families.build("llama", num_hidden_layers=layers)
                if first == "shard":
                    shard(model, segment_layers)
                if chunk_tokens:
                    lt.apply(model, lt.Plan(chunk_tokens=chunk_tokens, segment_layers=segment_layers, loss_chunk_tokens=8))
                if first == "apply":
                    shard(model, segment_layers)
                with CountCollectives() as mode:
                    model(**batch(rank), use_cache=False, num_items_in_batch=targets() / WORLD).loss.backward()
                counts = Counter()
                for (name, _), count in mode.counts.items():
                    counts["gather" if "gather" in name else "reduce-scatter" if "reduce_scatter" in name else name] += count
                segments = layers // segment_layers
                assert counts == {"gather": 2 * segments + 1, "reduce-scatter": segments + 1}, (segment_layers, chunk_tokens, first, counts)
                grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
                expected = expected or grads
                assert_close(grads, expected)


def refusals(rank, world):
    model = hf_families.build("llama")
    fully_shard(model.lm_head)
    shard(model)
    report = lt.apply(model, PLAN)
    assert "unit of fully_shard of its own" in str(report)
    assert_close(step(model, model, rank), one_process("llama"))
    model = hf_families.build("llama")
    mlp = model.base_model.layers[1].mlp
    parallelize_module(
        mlp,
        init_device_mesh("cpu", (WORLD,)),
        {"up_proj": ColwiseParallel(), "gate_proj": ColwiseParallel(), "down_proj": RowwiseParallel()},
    )
    with pytest.raises(ValueError, match="layers.1.mlp.* is sharded, and not by fully_shard: tensor-parallel"):
        lt.apply(model, PLAN)


@pytest.mark.slow
@pytest.mark.parametrize("work, arguments", [
    (ddp, ()), (fsdp, ("mixtral", "apply")), (fsdp, ("mixtral", "shard")), (fsdp, ("gemma2", "shard")), (collectives, ()), (refusals, ()),
])
def test_two_processes(work, arguments):
    run_ranks(work, WORLD, *arguments)
