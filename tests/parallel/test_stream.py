"""A model whose sequences several processes share: loss and gradients are those of one process, in float64, by every way."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import longtrain as lt
from longtrain.parallel import alltoall
from longtrain.parallel.by_heads import ByHeads
from longtrain.parallel.carry import QueriesTravel, Staying
from longtrain.parallel.cost import received
from longtrain.parallel.layout import ARRANGEMENTS
from longtrain.span import Layout
from longtrain.stream.kv_blocks import BlockKVCarry
from tests.processes import run_ranks
from tests.stream.conftest import TOLERANCE, VOCAB, assert_same, loss_and_grads, make_model

TOKENS = 70


def call(tokens: int = TOKENS, batch: int = 1, **extra) -> dict:
    ids = torch.randint(VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    return {"input_ids": ids, "labels": ids.clone(), **extra}


def masked() -> dict:
    """Labels that are all ignored on the first ranks."""
    masked_call = call()
    masked_call["labels"][:, :45] = -100
    return masked_call


def documents(*edges: int) -> torch.Tensor:
    return torch.tensor([0, *edges, TOKENS], dtype=torch.int32)


FEATURES = {
    "plain": (dict(), call),
    "one kv head": (dict(num_kv_heads=1), call),
    "windows and full": (dict(window=(9, None, 3)), call),
    "documents": (dict(window=(None, 6)), lambda: call(cu_seqlens=documents(1, 1, 21, 22, 47))),
    "dropout": (dict(attention_dropout=0.3, window=(None, 8)), call),
    "masked labels": (dict(), masked),
    "token weights": (dict(), lambda: call(token_weights=torch.rand(1, TOKENS, generator=torch.Generator().manual_seed(0)))),
    "normalizer and batch of two": (dict(), lambda: call(batch=2, normalizer=131.0)),
    "fewest tokens": (dict(), lambda: call(tokens=4)),
}

PLANS = {
    "chunks": lt.Plan(chunk_tokens=16),
    "one chunk": lt.Plan(chunk_tokens=1000),
    "segments, half of it stored": lt.Plan(chunk_tokens=13, segment_layers=2, store_outputs=0.5, store_kv=0.3, loss_chunk_tokens=5),
    "all stored, boundaries as tensors": lt.Plan(chunk_tokens=16, store_kv=1.0, boundaries="tensor"),
    "nothing stored": lt.Plan(chunk_tokens=16, store_outputs=0.0),
}

WAYS = {
    "heads": lt.Parallel(),
    "heads, striped": lt.Parallel(layout="striped", stripe=2),
    "queries": lt.Parallel(heads=1, way="queries", stripe=2),
    "queries, contiguous": lt.Parallel(heads=1, way="queries", layout="contiguous"),
    "ring": lt.Parallel(heads=1, way="ring", layout="zigzag"),
    "cheapest without heads": lt.Parallel(heads=1, stripe=2),
}
TWO_D = {
    "2 x 2, queries": lt.Parallel(heads=2, way="queries", stripe=2),
    "2 x 2, ring": lt.Parallel(heads=2, way="ring", layout="contiguous"),
    "2 x 2": lt.Parallel(heads=2, layout="zigzag"),
    "two machines": lt.Parallel(heads=1, way="ring", machine=2, layout="zigzag"),
}


def fits(plan: lt.Plan, parallel: lt.Parallel) -> bool:
    """A ring needs two passes, layer by layer."""
    return parallel.way != "ring" or plan.segment_layers == 1


def summed(grads: dict) -> dict:
    for grad in grads.values():
        dist.all_reduce(grad)
    return grads


def check(model, plan: lt.Plan, parallel: lt.Parallel, inputs: dict, what: str) -> None:
    """Each process has the whole batch; their gradients add up to those of one process, after the factor for averaging."""
    expected_loss, expected = loss_and_grads(copy.deepcopy(model), inputs)
    model = copy.deepcopy(model)
    report = lt.apply(model, plan, parallel=parallel)
    report.check_replay()
    loss, grads = loss_and_grads(model, inputs)
    grads = {name: grad / dist.get_world_size() for name, grad in summed(grads).items()}
    try:
        assert abs(float(loss - expected_loss)) <= TOLERANCE * abs(float(expected_loss))
        assert_same(grads, expected)
        assert not report.store.names()
    except AssertionError as error:
        raise AssertionError(f"{what}, rank {dist.get_rank()}: {error}") from error
    report.undo()


def quick(rank: int, world: int) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    ways = cycle(("heads", "cheapest without heads", "queries, contiguous"))
    for feature, (changes, make_call) in FEATURES.items():
        check(make_model(layers=2, **changes), PLANS["chunks"], WAYS[way := next(ways)], make_call(), f"{feature}, {way}")
    model = make_model(layers=3, window=(None, 9))
    for name, way in [
        ("one chunk", "ring"), ("segments, half of it stored", "heads, striped"), ("all stored, boundaries as tensors", "heads"),
        ("nothing stored", "queries"),
    ]:
        check(model, PLANS[name], WAYS[way], call(tokens=37), f"{name}, {way}")
    windows = make_model(window=(9, 3))
    check(windows, PLANS["chunks"], lt.Parallel(heads=1, way="halo", layout="contiguous"), call(cu_seqlens=documents(5, 40)), "halo")
    log_probabilities(rank, world)
    same_bits_every_time(rank, world)
    bytes_are_the_formulas(rank, world)
    blocks_of_whole_layers(rank, world)
    faults_are_seen(rank, world)
    bad_input(rank, world)


def log_probabilities(rank: int, world: int) -> None:
    """Those of the whole sequence on every process, and the gradients of an objective made of them, summed over processes."""
    inputs = {"input_ids": call()["input_ids"], "cu_seqlens": documents(1, 21, 47)}
    weights = torch.randn(2, 1, TOKENS, generator=torch.Generator().manual_seed(3))

    def run(model) -> tuple[torch.Tensor, dict]:
        model.zero_grad()
        logp, entropy = lt.token_logprobs(model, **inputs)
        (weights[0] * logp.exp() + weights[1] * entropy).sum().backward()
        return torch.stack([logp, entropy]).detach(), {name: p.grad for name, p in model.named_parameters()}

    model = make_model(window=(None, 9))
    found, expected = run(copy.deepcopy(model))
    for way in ("heads, striped", "queries"):
        ours = copy.deepcopy(model)
        report = lt.apply(ours, PLANS["chunks"], parallel=WAYS[way])
        of_all, grads = run(ours)
        assert (of_all - found).norm() <= TOLERANCE * found.norm()
        assert_same({name: grad / world for name, grad in summed(grads).items()}, expected)
        report.undo()
        assert not hasattr(ours, "longtrain_sharing")


def same_bits_every_time(rank: int, world: int) -> None:
    for way, parallel in {**WAYS, **(TWO_D if world == 4 else {})}.items():
        model = make_model(num_kv_heads=1).float()
        lt.apply(model, PLANS["chunks"], parallel=parallel)
        (loss, grads), (again, same) = (loss_and_grads(model, call()) for _ in range(2))
        assert loss == again and all(torch.equal(grads[name], same[name]) for name in grads), way


def bytes_are_the_formulas(rank: int, world: int) -> None:
    """Bytes counted while a step of two layers streams, against `longtrain.parallel.cost`: exact where everybody needs everything."""
    chunks, tokens = 4, 16 * world
    halo = lt.Parallel(heads=1, way="halo", layout="contiguous")
    cases = [("heads", "heads", {}), ("heads", "heads", dict(num_kv_heads=1)), ("queries", "queries", {}), ("ring", "ring", {}),
             ("halo", halo, dict(window=(3,)))]  # fmt: skip
    cases += [("queries", "2 x 2, queries", {}), ("ring", "2 x 2, ring", {})] if world == 4 else []
    for (name, way, changes), blocks in [*((case, None) for case in cases), (cases[0], 2), (cases[1], 1)]:
        parallel = way if way is halo else {**WAYS, **TWO_D}[way]
        shape = dict(hidden_size=8 * world, num_heads=2 * world, num_kv_heads=world, head_dim=4) | changes
        model = make_model(layers=2, **shape)
        plan = lt.Plan(chunk_tokens=tokens // chunks, kv_block_tokens=blocks and blocks * tokens // chunks)
        report = lt.apply(model, plan, parallel=parallel)
        traffic = report.sharing.mesh.all.traffic
        loss = model(**call(tokens=tokens)).loss
        forward = traffic.total()
        loss.backward()
        counted = torch.tensor([forward, traffic.total() - forward])
        dist.all_reduce(counted)
        heads, ring = report.sharing.mesh.heads.size, report.sharing.mesh.ring.size
        expected = received(name, report.sharing.shapes[0][0], tokens, heads=heads, ring=ring, chunks=chunks, blocks=blocks is not None)
        expected = torch.tensor([expected.forward, expected.backward], dtype=torch.float64) * 2 * world
        if name == "heads":
            assert torch.equal(counted.double(), expected), (name, changes, counted, expected)
        elif name == "halo":  # one of the sequence's runs has nothing before it
            torch.testing.assert_close(counted.double(), expected * (1 - 1 / (chunks * world)), rtol=1e-12, atol=0)
        else:  # the first queries see nothing of later ranks
            assert (counted <= expected).all() and (counted >= expected * (1 - 1 / chunks)).all(), (way, counted, expected)
        assert name in report.sharing.explain(tokens)


def blocks_of_whole_layers(rank: int, world: int) -> None:
    """Only layers that see the whole sequence keep keys and values, and by heads a chunk meets the blocks once in each pass."""
    plan, model, inputs = lt.Plan(chunk_tokens=16, kv_block_tokens=32), make_model(layers=2, window=(None, 9)), call(tokens=16 * 5)
    for way in ("heads", "queries"):
        ours, passes = copy.deepcopy(model), []
        report = lt.apply(ours, plan, parallel=WAYS[way])
        with pytest.MonkeyPatch.context() as patch:
            for name in ("blocks", "adjoint_blocks"):
                patch.setattr(BlockKVCarry, name, lambda *given, f=getattr(BlockKVCarry, name): passes.append(f) or f(*given))
            loss = ours(**inputs).loss
            kept = {str(name) for name in report.store.names() if str(name).startswith(("layer 0 k", "layer 1 k"))}
            assert len(kept) == 1 and kept.pop().startswith("layer 0"), (way, report.store.names())
            loss.backward()
        assert way != "heads" or len(passes) == 2 * 5


def forgets(sums):
    """Of blocks, what was added to their gradients by later queries."""
    return lambda self, part, k, v: tuple(x if self._own else torch.zeros_like(x) for x in sums(self, part, k, v))


FAULTS = {
    "swapped dK and dV, by heads": ("heads", ByHeads, "take_grad", lambda f: lambda self, span: f(self, span)[::-1]),
    "swapped dK and dV, queries": ("queries", QueriesTravel, "take_grad", lambda f: lambda self, span: f(self, span)[::-1]),
    "replicas not summed": ("heads", alltoall, "to_tokens", lambda f: lambda *given, summed=(): f(*given)),
    "a wrong hop": ("queries", Staying, "_queries", lambda f: lambda self, span: f(self, span)[1:] + f(self, span)[:1]),
    "sums of blocks forgotten": ("queries", BlockKVCarry, "_sums", forgets),
}


def faults_are_seen(rank: int, world: int) -> None:
    model, inputs = make_model(num_kv_heads=1), call(tokens=32 * world)
    plan = lt.Plan(chunk_tokens=8 * world, kv_block_tokens=8 * world)
    for name, (way, of, attribute, fault) in {"none": ("queries", Staying, "_queries", lambda f: f), **FAULTS}.items():
        with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError) if name in FAULTS else nullcontext():
            patch.setattr(of, attribute, fault(getattr(of, attribute)))
            check(model, plan, WAYS[way], inputs, name)


def bad_input(rank: int, world: int) -> None:
    model = make_model()
    lt.apply(model, lt.Plan(chunk_tokens=16), parallel=lt.Parallel())
    with pytest.raises(ValueError, match="processes that share a sequence were given different ones"):
        model(**call(tokens=30 + rank))
    with pytest.raises(ValueError, match="1 tokens cannot be spread over"):
        model(**call(tokens=1))
    with pytest.raises(ValueError, match="30 tokens, which is not this process's part of a sequence: call the model itself"):
        model.model(call(tokens=30)["input_ids"], Layout.make(30), None)
    with pytest.raises(ValueError, match=f"{world} ranks, of which 1 exchange heads, do not make up machines of 5"):
        lt.apply(make_model(), lt.Plan(chunk_tokens=16), parallel=lt.Parallel(heads=1, machine=5))
    for what, plan, parallel, model in [
        ("plans", lt.Plan(chunk_tokens=16 + rank), lt.Parallel(), make_model()),
        ("settings", lt.Plan(chunk_tokens=16), lt.Parallel(stripe=1 + rank), make_model()),
        ("models", lt.Plan(chunk_tokens=16), lt.Parallel(), make_model(num_kv_heads=1 + rank % 2)),
    ]:
        with pytest.raises(ValueError, match=f"share sequences were given different {what} .process {rank}: "):
            lt.apply(model, plan, parallel=parallel)
    for wrong, says in [
        (dict(heads=3), "cannot be cut into groups of 3"),
        (dict(heads=1, way="halo"), "halo, and that cannot be: a query sees all that came before"),
    ]:
        other = make_model()
        with pytest.raises(ValueError, match=says):
            lt.apply(other, lt.Plan(chunk_tokens=16), parallel=lt.Parallel(**wrong))
            other(**call())


def test_two_ranks():
    run_ranks(quick, 2)


def every_feature(rank: int, world: int) -> None:
    """By every way, each with a plan, so that every way meets every plan."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    ways = list({**WAYS, **(TWO_D if world == 4 else {})}.items())
    for i, (feature, (changes, make_call)) in enumerate(FEATURES.items()):
        model = make_model(layers=2, **changes)
        for k, (way, parallel) in enumerate(ways):
            plan = list(PLANS)[(i + k) % len(PLANS)]
            plan = plan if fits(PLANS[plan], parallel) else "chunks"
            check(model, PLANS[plan], parallel, make_call(), f"P={world}, {feature}, {plan}, {way}")


def every_plan(rank: int, world: int) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = make_model(layers=3, window=(None, 9))
    for name, plan in PLANS.items():
        for way, parallel in (WAYS if world < 4 else TWO_D).items():
            if fits(plan, parallel):
                check(model, plan, parallel, call(tokens=37), f"P={world}, {name}, {way}")
    for layout in ARRANGEMENTS:
        halo = lt.Parallel(heads=1, way="halo", layout=layout, stripe=2)
        check(make_model(window=(9, 3)), PLANS["chunks"], halo, call(cu_seqlens=documents(5, 40)), f"P={world}, halo, {layout}")
    same_bits_every_time(rank, world)
    bytes_are_the_formulas(rank, world)
    faults_are_seen(rank, world)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_feature(world):
    run_ranks(every_feature, world)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_plan_and_way(world):
    run_ranks(every_plan, world)


def in_every_tier(directory: str, store_kv: float) -> lt.Plan:
    away, halves = lt.Split(), lt.Split(device=0.3, host=0.3)
    disk = lt.DiskSettings(path=directory, budget=2**26)
    offload = lt.Offload(inputs=away, gradients=halves, outputs=halves, kv=away, host_bytes=2**24, disk=disk)
    return lt.Plan(chunk_tokens=16, store_outputs=0.6, store_kv=store_kv, offload=offload)


def with_disk(rank: int, world: int, directory: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model, plan = make_model(layers=3, window=(None, 9)), in_every_tier(directory, store_kv=1.0)
    for way, parallel in {**WAYS, **(TWO_D if world == 4 else {})}.items():
        check(model, plan, parallel, call(cu_seqlens=documents(33)), f"P={world}, disk, {way}")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_with_disk(world, disk):
    run_ranks(with_disk, world, disk)


BLOCKS = [
    lt.Plan(chunk_tokens=16, kv_block_tokens=16),
    lt.Plan(chunk_tokens=16, kv_block_tokens=32, store_outputs=0.3, segment_layers=2),
    lt.Plan(chunk_tokens=13, kv_block_tokens=39, store_outputs=0.0),
]
"""Of keys and values: the last chunk of a block, and of the sequence, is spread unevenly over processes."""


def in_blocks(rank: int, world: int, directory: str) -> None:
    """Keys and values in blocks, from processes and from tiers: gradients of one process, the same bits wherever the blocks lie."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    ways = {name: way for name, way in {**WAYS, **(TWO_D if world == 4 else {})}.items() if way.way != "ring"}
    calls = cycle((call(), call(cu_seqlens=documents(33)), call(tokens=37, batch=2)))
    models = cycle((make_model(layers=3, window=(None, 9)), make_model(num_kv_heads=1, attention_dropout=0.2)))
    for plan, (name, parallel) in product(BLOCKS, ways.items()):
        model, inputs = next(models), next(calls)
        check(model, plan, parallel, inputs, f"P={world}, {plan}, {name}")
        away = replace(in_every_tier(directory, store_kv=0.0).offload, kv=lt.Split(device=0.2, host=0.3))
        bits = []
        for offload in (None, away):
            ours = copy.deepcopy(model)
            report = lt.apply(ours, replace(plan, offload=offload), parallel=parallel)
            bits.append(loss_and_grads(ours, inputs))
            assert not report.store.names()
        (loss, grads), (again, same) = bits
        assert loss == again and all(torch.equal(grads[name], same[name]) for name in grads), (plan, name)
    with pytest.raises(ValueError, match="parallel.way is ring, and that cannot be: all of a layer's keys travel in it at one time"):
        model = make_model()
        lt.apply(model, BLOCKS[0], parallel=WAYS["ring"])
        model(**call())


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_in_blocks(world, disk):
    run_ranks(in_blocks, world, disk)


def groups_of_two(rank: int, world: int) -> None:
    """Two sequences, each shared by two processes, and the mean over all four as DDP and FSDP2 take it."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model, sequences = make_model(layers=2), [call(tokens=50), masked()]
    targets = sum(int((s["labels"][:, 1:] != -100).sum()) for s in sequences)
    loss, expected = loss_and_grads(copy.deepcopy(model), *({**s, "normalizer": targets} for s in sequences))
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("dp", "cp_ring", "cp_ulysses"))
    group = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])[0]
    for shared, how in [(mesh["cp_ring", "cp_ulysses"], "DDP"), (group, "FSDP2"), (group, "DDP")]:
        ours = copy.deepcopy(model)
        lt.apply(ours, PLANS["chunks"], group=shared, parallel=lt.Parallel(stripe=2))
        if how == "FSDP2":
            for layer in ours.model.layers:
                fully_shard(layer)
            fully_shard(ours)
        module = nn.parallel.DistributedDataParallel(ours) if how == "DDP" else ours
        module(**{**sequences[rank // 2], "normalizer": targets / 2}).loss.backward()
        grads = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in ours.named_parameters()}
        assert_same(grads, expected)


@pytest.mark.slow
def test_groups_of_two_under_ddp_and_fsdp2():
    run_ranks(groups_of_two, 4)


@pytest.mark.parametrize("wrong, says", [
    (dict(layout="ring"), "parallel.layout must be one of auto, contiguous, zigzag, striped, found 'ring'"),
    (dict(way="tree"), "parallel.way must be one of auto, heads, ring, queries, halo, found 'tree'"),
    (dict(heads=0), "parallel.heads must be an integer of at least 1, found 0"),
])
def test_wrong_settings(wrong, says):
    with pytest.raises(ValueError, match=says):
        lt.Parallel(**wrong)
