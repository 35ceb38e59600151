"""Hybrid models whose sequences several processes share: states go from process to process, loss and gradients are those of the family's
own code in one process, in float64."""

from __future__ import annotations

import hf_families
import pytest
import torch
import torch.distributed as dist

import longtrain as lt
from longtrain.double import InDouble
from longtrain.span import Layout
from tests.hf.test_shared import batch, gradients
from tests.processes import run_ranks

EXACT = 1e-12
TOKENS = 57
CALLS = {
    "one row": batch, "two rows": lambda: batch(rows=2), "packed": lambda: batch(packed=True), "documents": lambda: documents(),
}  # fmt: skip
WAYS = {
    "contiguous": lt.Parallel(),
    "zigzag": lt.Parallel(layout="zigzag"),
    "striped, no heads": lt.Parallel(layout="striped", stripe=2, heads=1, way="queries"),
    "ring": lt.Parallel(heads=1, way="ring"),
}
FAMILIES = (
    "lfm2", "qwen3_next", "qwen3_5_text", "olmo_hybrid", "bamba", "granitemoehybrid", "nemotron_h", "mamba2", "lfm2_moe", "falcon_h1",
)  # fmt: skip


EDGES = (0, 1, 16, 17, 31, 32, 57)
"""Documents of one token, and that end behind the first token of a chunk."""


def documents() -> dict:
    """Documents by cu_seq_lens, which keep states apart too; nothing predicts their first tokens."""
    call = batch()
    call["labels"][:, EDGES[:-1]] = -100
    cu = torch.tensor(EDGES, dtype=torch.int32)
    return call | dict(position_ids=Layout(TOKENS, EDGES).positions()[None], cu_seq_lens_q=cu, cu_seq_lens_k=cu)


def in_rows(model, *, input_ids, labels, **packed) -> tuple[float, dict]:
    """Loss and gradients of each document in a row of its own, added up."""
    count, losses, total = int((labels != -100).sum()), [], {}
    for first, behind in zip(EDGES, EDGES[1:], strict=False):
        row = slice(first, behind)
        loss, grads = gradients(model, input_ids=input_ids[:, row], labels=labels[:, row], num_items_in_batch=count)
        losses.append(loss)
        total = {name: total.get(name, 0) + grad for name, grad in grads.items()}
    return sum(losses), total


def check(family: str, plan: lt.Plan, parallel: lt.Parallel, call: dict, case: str, change=lambda model: None) -> None:
    with InDouble():
        model = hf_families.build(family)
        change(model)
        expected_loss, expected = in_rows(model, **call) if "cu_seq_lens_q" in call else gradients(model, **call)
        report = lt.apply(model, plan, parallel=parallel)
        report.check_replay()
        for _ in range(2):
            loss, grads = gradients(model, **call)
            assert abs(loss - expected_loss) <= EXACT * expected_loss, f"{case}: {loss} {expected_loss}"
            assert grads.keys() == expected.keys(), case
            for name, grad in grads.items():
                dist.all_reduce(grad)
                error = float((grad / dist.get_world_size() - expected[name]).norm() / expected[name].norm())
                assert error <= EXACT, f"{case}, {name}: {error:.1e}"
        report.undo()
        again, _ = in_rows(model, **call) if "cu_seq_lens_q" in call else gradients(model, **call)
        assert abs(again - expected_loss) <= EXACT * expected_loss, f"{case}: undo left something behind"


def only(*trained: str):
    """All other weights frozen."""

    def change(model) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in trained))

    return change


def bytes_are_the_formula(rank: int, world: int) -> None:
    """A state of each of its two convolutions, forward; its gradient, backward: of all ranks together."""
    model = hf_families.build("lfm2")
    report = lt.apply(model, lt.Plan(chunk_tokens=16), parallel=WAYS["zigzag"])
    gradients(model, **CALLS["one row"]())
    sharing = report.sharing
    received = sharing.mesh.all.traffic.received
    counted = torch.tensor([received["states"], received["dstates"]])
    dist.all_reduce(counted)
    choices = [sharing.choice(shape, sharing.shards(TOKENS)) for of_layer in sharing.shapes for shape in of_layer]
    cost = next(choice.costs["turns"] for choice in choices if choice.way == "turns")
    assert counted.tolist() == pytest.approx([2 * world * cost.forward, 2 * world * cost.backward])
    waits = {2: "33%", 3: "56%", 4: "67%"}[world]
    turns = "turns (turns 0.0 + 0.0 MiB); not all at once: only the layer knows how its states change"
    why = f"layers 0, 2: {turns}, so {world} ranks take turns"
    assert f"{why}, chunk after chunk: each waits {waits} of its time" in sharing.explain(TOKENS)
    assert f"{why}\n" in sharing.explain(16) + "\n", "one chunk"
    with torch.no_grad():
        forward, backward = received["states"], received["dstates"]
        model(**CALLS["one row"](), use_cache=False)
        assert (received["states"], received["dstates"]) == (2 * forward, backward)


def quick(rank: int, world: int) -> None:
    cases = [("lfm2", "zigzag", "two rows"), ("qwen3_next", "contiguous", "packed"), ("bamba", "striped, no heads", "one row"),
             ("falcon_h1", "zigzag", "documents")]  # fmt: skip
    for family, way, call in cases:
        check(family, lt.Plan(chunk_tokens=16), WAYS[way], CALLS[call](), f"P={world}, {family}, {way}, {call}")
    bytes_are_the_formula(rank, world)


def test_two_processes():
    run_ranks(quick, 2)


def every_family(rank: int, world: int) -> None:
    plans = [lt.Plan(chunk_tokens=16), lt.Plan(chunk_tokens=64), lt.Plan(chunk_tokens=16, boundaries="tensor", store_outputs=0.5)]
    ways = dict(list(WAYS.items())[:1]) if world == 1 else WAYS
    for i, family in enumerate(FAMILIES):
        for k in range(2 if world == 2 else 1):
            way, call = list(ways)[(i + 2 * k) % len(ways)], list(CALLS)[(i + k) % len(CALLS)]
            call = "packed" if family == "mamba2" and call == "documents" else call  # its model keeps cu_seq_lens from its layers
            plan = plans[(i + k) % len(plans)]
            check(family, plan, WAYS[way], CALLS[call](), f"P={world}, {family}, {way}, {call}, {plan}")
    for trained in ("embed", "layers.0.conv"):  # gradients that come through states alone
        check("lfm2", plans[0], WAYS["contiguous"], CALLS["one row"](), f"P={world}, {trained} alone", only(trained))
    if world > 1:
        bytes_are_the_formula(rank, world)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_family(world):
    run_ranks(every_family, world)
