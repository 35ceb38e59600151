"""A transformers model whose sequences several processes share: loss and gradients are those of the family's own code in one process."""

from itertools import cycle

import hf_families
import pytest
import torch
import torch.distributed as dist

import longtrain as lt
from tests.processes import run_ranks

TOKENS, CLOSE = 57, 1e-6
"""Families round rotary angles, norms and losses to float32."""

PACKED = torch.cat([torch.arange(n) for n in (1, 20, 36)])[None]


def batch(packed=False, rows=1):
    ids = torch.randint(3, hf_families.VOCAB, (rows, TOKENS), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :31] = -100  # none on the first of several processes
    return dict(input_ids=ids, labels=labels, **(dict(position_ids=PACKED) if packed else {}))


def gradients(model, **call):
    model.zero_grad()
    loss = model(**call, use_cache=False).loss
    loss.backward()
    return float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(family, plan, parallel, call):
    expected_loss, expected = gradients(hf_families.build(family), **call)
    model = hf_families.build(family)
    report = lt.apply(model, plan, parallel=parallel)
    loss, grads = gradients(model, **call)
    assert abs(loss - expected_loss) <= CLOSE * expected_loss, f"{family}, {parallel}: {loss} {expected_loss}"
    for name, grad in grads.items():
        dist.all_reduce(grad)
        error = float((grad / dist.get_world_size() - expected[name]).norm() / expected[name].norm())
        assert error <= CLOSE, f"{family}, {parallel}, {name}: {error:.1e}"
    report.undo()
    again, grads = gradients(model, **call)
    assert abs(again - expected_loss) <= CLOSE * expected_loss, "undo left something behind"


def log_probabilities(rank, world):
    """On every process those of the whole sequence, as one process has them, and an objective's gradients in parts."""
    ids, weights = batch()["input_ids"], torch.linspace(-1, 1, TOKENS)

    def run(parallel):
        model = hf_families.build("llama")
        lt.apply(model, lt.Plan(chunk_tokens=16), parallel=parallel)
        logp, entropy = lt.token_logprobs(model, ids, cu_seqlens=[0, 1, 21, TOKENS])
        (weights * (logp.exp() + entropy)).sum().backward()
        return torch.stack([logp, entropy]).detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (alone, expected), (shared, grads) = run(None), run(lt.Parallel())
    assert (shared - alone).norm() <= CLOSE * alone.norm()
    for name, grad in grads.items():
        dist.all_reduce(grad)
        assert (grad / world - expected[name]).norm() <= CLOSE * expected[name].norm(), name


def dropout(rank, world):
    """One mask, that of the first process's seed, whatever the others' are."""

    def run(parallel, seed):
        model = hf_families.build("llama", attention_dropout=0.3)
        lt.apply(model, lt.Plan(chunk_tokens=16), parallel=parallel)
        torch.manual_seed(seed)
        return gradients(model, **batch(packed=True))

    expected_loss, expected = run(None, 5)
    assert run(None, 6)[0] != expected_loss
    for parallel in (lt.Parallel(), lt.Parallel(heads=1, way="queries", stripe=4)):
        loss, grads = run(parallel, 5 + rank)
        assert abs(loss - expected_loss) <= CLOSE * expected_loss
        for name, grad in grads.items():
            dist.all_reduce(grad)
            assert (grad / world - expected[name]).norm() <= CLOSE * expected[name].norm(), name


def quick(rank, world):
    log_probabilities(rank, world)
    dropout(rank, world)
    check("llama", lt.Plan(chunk_tokens=16), lt.Parallel(), batch(packed=True))
    check("mistral", lt.Plan(chunk_tokens=20, segment_layers=2, store_outputs=0.5), lt.Parallel(heads=1, stripe=4), batch(rows=2))
    model = hf_families.build("llama")
    lt.apply(model, lt.Plan(chunk_tokens=16), parallel=lt.Parallel())
    for wrong, says in [
        (dict(attention_mask=torch.tensor([[1] * 50 + [0] * 7])), "attention_mask with padding cannot be spread"),
        (dict(token_type_ids=torch.zeros(1, TOKENS)), "token_type_ids runs along the tokens"),
        (dict(position_ids=PACKED.expand(2, -1)), "pack documents into one row"),
    ]:
        with pytest.raises(ValueError, match=says):
            model(**{**batch(), **wrong})


def test_two_processes():
    run_ranks(quick, 2)


def families(rank, world):
    dropout(rank, world)
    model = hf_families.build("qwen3_moe")
    lt.apply(model, lt.Plan(chunk_tokens=16), parallel=lt.Parallel())
    with pytest.raises(ValueError, match="the balancing loss of experts is not summed over processes"):
        model(**batch(), output_router_logits=True)
    chunked = hf_families.build("llama4_text")
    lt.apply(chunked, lt.Plan(chunk_tokens=16), parallel=lt.Parallel())
    with pytest.raises(ValueError, match="chunked attention.* cannot be spread over processes yet"):
        chunked(**batch(packed=True))
    ways = [lt.Parallel(), lt.Parallel(heads=1, way="queries", stripe=4), lt.Parallel(heads=1, way="ring", layout="zigzag")]
    ways = ways[:1] if world == 1 else ways
    ways += [lt.Parallel(heads=2, way="queries", stripe=4)] if world == 4 else []
    calls = cycle((batch(packed=True), batch(rows=2)))
    for family in ("llama", "mistral", "gemma2", "gpt_oss", "qwen3_moe"):
        for parallel in ways:
            check(family, lt.Plan(chunk_tokens=16), parallel, next(calls))
        if len(ways) % 2 == 0:
            next(calls)  # so that every way meets both
    for parallel in ways:
        check("llama4_text", lt.Plan(chunk_tokens=16), parallel, batch(rows=2))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_families(world):
    run_ranks(families, world)


def fifty_steps(rank, world):
    """Losses of training on what several processes share, against those of one."""
    losses = {}
    for shared in (False, True):
        model = hf_families.build("llama").float()
        if shared:
            lt.apply(model, lt.Plan(chunk_tokens=16), parallel=lt.Parallel())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[shared] = []
        for _ in range(50):
            loss, grads = gradients(model, **batch())
            for grad in grads.values() if shared else ():
                dist.all_reduce(grad, op=dist.ReduceOp.SUM)
                grad /= world
            optimizer.step()
            losses[shared].append(loss)
    worst = max(abs(a - b) / b for a, b in zip(losses[True], losses[False], strict=True))
    assert losses[True][-1] < 0.5 * losses[True][0], "it learned nothing"
    assert worst <= 1e-5, f"losses differ by {worst:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_fifty_steps(world):
    run_ranks(fifty_steps, world)
