"""Two gloo processes: DDP and FSDP2 around a streamed transformers model; a model that is sharded already is refused."""

import hf_families
import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import longtrain as lt
from tests.processes import run_ranks

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


def worker(rank, world, family, how):
    expected, model = one_process(family), hf_families.build(family)

    def shard():
        for layer in model.base_model.layers:
            fully_shard(layer)
        fully_shard(model)

    report = lt.apply(model, PLAN)
    if how == "FSDP2":
        shard()
    module = DistributedDataParallel(model) if how == "DDP" else model
    # both average over ranks: the local sum over the global count, times the number of ranks
    module(**batch(rank), num_items_in_batch=targets() / WORLD).loss.backward()
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        error = float((grad - expected[name]).norm() / expected[name].norm())
        assert error <= CLOSE, f"{how}, {name}: {error:.1e}"
    if how == "FSDP2":
        report.undo()
        with pytest.raises(ValueError, match="sharded already: call lt.apply before fully_shard"):
            lt.apply(model, PLAN)


@pytest.mark.slow
@pytest.mark.parametrize("how, family", [("DDP", "llama"), ("FSDP2", "mixtral")])
def test_gradients_are_those_of_one_process(how, family):
    run_ranks(worker, WORLD, family, how)
