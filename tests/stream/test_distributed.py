"""Two gloo processes: DDP and FSDP2 around a streamed model give the plain model's gradients by the same collectives."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import longtrain as lt
from longtrain.nn import LanguageModel, count_targets
from tests.processes import run_ranks
from tests.stream.conftest import VOCAB, assert_same, make_model

TOKENS, WORLD = 33, 2


def batch(rank: int) -> dict:
    """Each rank's own tokens, with unequal numbers of valid targets."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(VOCAB, (1, TOKENS), generator=generator)
    labels = ids.clone()
    labels[:, : 5 + 13 * rank] = -100
    return {"input_ids": ids, "labels": labels}


def global_targets() -> int:
    return sum(count_targets(batch(rank)["labels"]) for rank in range(WORLD))


def step(model: nn.Module, module: nn.Module, rank: int) -> dict[str, torch.Tensor | None]:
    """Local sum x world size / global valid tokens, as averaging DDP and FSDP2 want it; gradients whole on every rank."""
    loss = module(**batch(rank), normalizer=global_targets() / WORLD).loss
    loss.backward()
    grads = {}
    for name, p in model.named_parameters():
        grad = p.grad
        grads[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return grads


def one_process(model: LanguageModel) -> dict[str, torch.Tensor | None]:
    for rank in range(WORLD):
        model(**batch(rank), normalizer=global_targets()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


class CountCollectives(TorchDispatchMode):
    """Calls of c10d operators, by name and by bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            size = sum(t.nbytes for t in tree_flatten(args)[0] if isinstance(t, torch.Tensor))
            self.counts[func.__name__, size] += 1
        return func(*args, **(kwargs or {}))


def count_ddp(model: LanguageModel, rank: int) -> tuple[dict, list[int]]:
    ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.01)
    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook(None, hook)
    return step(model, ddp, rank), reduced


def count_fsdp(model: LanguageModel, rank: int, segment_layers: int, then: lt.Plan | None = None) -> tuple[dict, dict]:
    """Gradients and collectives of a step of the model, sharded, and then streamed by a plan if one is given."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    layers = list(model.model.layers)
    for at in range(0, len(layers), segment_layers):
        unit = layers[at : at + segment_layers]
        fully_shard(unit if len(unit) > 1 else unit[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    if then is not None:
        lt.apply(model, then)
    with CountCollectives() as mode:
        loss = model(**batch(rank), normalizer=global_targets() / WORLD).loss
        loss.backward()
    grads = {name: None if p.grad is None else p.grad.full_tensor() for name, p in model.named_parameters()}
    return grads, dict(mode.counts)


def work(rank: int, world: int) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = make_model(layers=4, window=(None, 7))
    expected = one_process(copy.deepcopy(model))

    plain_grads, plain_buckets = count_ddp(copy.deepcopy(model), rank)
    assert_same(plain_grads, expected)
    for plan in plans():
        streamed = copy.deepcopy(model)
        lt.apply(streamed, plan)
        grads, buckets = count_ddp(streamed, rank)
        assert_same(grads, expected)
        assert sorted(buckets) == sorted(plain_buckets), (buckets, plain_buckets)

    frozen = copy.deepcopy(model)
    frozen.model.layers[1].requires_grad_(False)
    lt.apply(frozen, plans()[0])
    count_ddp(frozen, rank)

    for plan in plans():
        plain_grads, plain_counts = count_fsdp(copy.deepcopy(model), rank, plan.segment_layers)
        assert_same(plain_grads, expected)
        streamed = copy.deepcopy(model)
        lt.apply(streamed, plan)
        grads, counts = count_fsdp(streamed, rank, plan.segment_layers)
        assert_same(grads, expected)
        assert counts == plain_counts and counts, (counts, plain_counts)
    # the last plan once more, on a model that is sharded before it is streamed
    grads, counts = count_fsdp(copy.deepcopy(model), rank, plan.segment_layers, then=plan)
    assert_same(grads, expected)
    assert counts == plain_counts, (counts, plain_counts)


def plans() -> list[lt.Plan]:
    return [
        lt.Plan(chunk_tokens=8),
        lt.Plan(chunk_tokens=8, segment_layers=2, store_outputs=0.5, boundaries="stream"),
        lt.Plan(chunk_tokens=8, segment_layers=2, store_outputs=0.5, store_kv=0.7, boundaries="tensor"),
    ]


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_two_processes_ddp_and_fsdp2():
    run_ranks(work, WORLD)
