"""The cases of `tools/fuzz_parallel.py`: what is drawn, and what has to hold for it. In float64."""

from __future__ import annotations

import copy
import random
from contextlib import nullcontext

import torch
import torch.distributed as dist

import longtrain as lt
from longtrain.double import InDouble
from longtrain.nn import LanguageModel, ModelConfig

CLOSE, NOISE = 1e-10, 1e-13
"""How far a tensor may be off, of its own norm, and of that of all: a gradient that is zero by mathematics is rounding noise."""
VOCAB = 61
KINDS = ("attention", "window", "linear", "delta", "lact", "conv")
PLAIN = ("llama", "qwen3", "gemma3_text", "mistral", "gpt_oss")
IN_TURNS = ("lfm2", "qwen3_next", "olmo_hybrid", "bamba", "nemotron_h", "falcon_h1", "mamba2")
IGNORES_CU = ("mamba2",)
"""Its model keeps cu_seq_lens from its layers."""


def draw(seed: int, ranks: int, own: bool) -> dict:
    """A case, as data: everything but the weights, the ids and which weights are frozen."""
    r = random.Random(seed)
    some = lambda share, value, other=None: value() if r.random() < share else other
    family = None if own else some(0.25, lambda: r.choice(PLAIN + IN_TURNS))
    kinds, heads = tuple(r.choices(KINDS, k=r.randint(1, 4))), r.choice((1, 1, 2, 3))
    shape = dict(layers=kinds, num_layers=r.randint(1, 4), num_kv_heads=heads, num_heads=heads * r.randint(1, 3), head_dim=r.choice((4, 6)))
    shape |= dict(tie_embeddings=r.random() < 0.2, attention_dropout=some(0.2, lambda: 0.3, 0.0))
    shape |= dict(conv_taps=r.choice((1, 3, 9, 40)), conv_implicit=r.random() < 0.3) if "conv" in kinds else {}
    shape |= dict(lact_chunk=r.choice((1, 5, 16))) if "lact" in kinds else {}
    shape |= dict(window=tuple(r.choice((1, 5, 20, 90)) for _ in range(r.randint(1, 2)))) if "window" in kinds else {}
    least = ranks * (2 if family in IN_TURNS else 1)
    tokens, batch = some(0.15, lambda: least + r.randint(0, 1), r.randint(least, 90)), r.choice((1, 1, 2))
    edges = some(0.5, lambda: [0, *sorted(r.randint(0, tokens) for _ in range(r.randint(1, 6))), tokens]) if batch == 1 else None
    without_heads = ("auto", "queries", "ring", "halo")[: 3 + (not family and "attention" not in kinds)]
    ways = [{}, {}, dict(way="heads"), *(dict(heads=1, way=way) for way in without_heads)]
    ways += [dict(heads=2, way=r.choice(("auto", "queries", "ring"))), dict(heads=1, way="ring", machine=2)] if ranks == 4 else []
    parallel = r.choice(ways) | dict(
        layout=r.choice(("auto", "contiguous", "zigzag", "striped")), conv=r.choice(("auto", "auto", "halo", "channels")),
        states=r.choice(("auto", "heads", "scan")), gradients=r.choice(("mean", "sum")), stripe=some(0.6, lambda: r.randint(1, 6)),
    )  # fmt: skip
    parallel |= dict(states="scan") if parallel.get("heads") == 1 and parallel["states"] == "heads" else {}
    parallel |= some(0.05, lambda: dict(heads=r.randint(1, 5), way=r.choice(("auto", "heads", "halo")), machine=r.choice((None, 2, 3))), {})
    share, layers = lambda: r.choice((0.0, 0.37, 1.0)), 3 if family else shape["num_layers"]
    plan = dict(
        chunk_tokens=r.choice((least + r.randint(0, 3), r.randint(least, 40), 1000)), segment_layers=some(0.25, lambda: r.randint(2, 3), 1),
        store_outputs=some(0.2, lambda: tuple(share() for _ in range(layers)), share()), store_kv=share(),
        boundaries=some(0.2, lambda: "tensor", "stream"), loss_chunk_tokens=some(0.5, lambda: r.randint(1, 20)),
    )  # fmt: skip
    plan |= some(0.25, lambda: dict(kv_block_tokens=plan["chunk_tokens"] * r.randint(1, 4)), {})
    if "ring" in parallel.values() or parallel["conv"] == "channels":
        plan |= some(0.95, lambda: dict(segment_layers=1, kv_block_tokens=None), {})
    moved = ("outputs", "kv") if plan["boundaries"] == "tensor" else ("outputs", "kv", "inputs", "gradients")
    places = (lt.Split(device=1.0), lt.Split(), lt.Split(host=1.0), lt.Split(device=0.3, host=0.3))
    return dict(
        seed=seed, family=family, shape=None if family else shape, tokens=tokens, batch=batch, edges=edges, parallel=parallel, plan=plan,
        first_label=r.choice((0, 0, tokens // 2, tokens - 2)), masked=r.choice((0.0, 0.5)), frozen=r.choice((0.0, 0.0, 0.0, 0.2, 0.9)),
        offload=some(0.2, lambda: {kind: r.choice(places) for kind in moved}),
        cu_seq_lens=bool(family and edges) and family not in IGNORES_CU and r.random() < 0.5,
    )  # fmt: skip


def build(case: dict) -> tuple[torch.nn.Module, dict]:
    """The model and its call."""
    torch.manual_seed(case["seed"])
    if case["family"]:
        import hf_families
        import transformers  # which takes its time

        transformers.logging.set_verbosity_error()
        model = hf_families.build(case["family"])
    else:
        small = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=40, initializer_range=0.2)
        model = LanguageModel(ModelConfig(**small, **case["shape"]))
    r, parameters, edges = random.Random(case["seed"]), list(model.parameters()), case["edges"]
    for parameter in parameters:
        parameter.requires_grad_(r.random() >= case["frozen"])
    r.choice(parameters).requires_grad_()
    ids = torch.randint(3, VOCAB, (case["batch"], case["tokens"]))
    labels = ids.masked_fill(torch.rand(ids.shape) < case["masked"], -100)
    labels[:, : max(0, case["first_label"])], labels[:, -1] = -100, ids[:, -1]
    inputs = dict(input_ids=ids, labels=labels, **(dict(use_cache=False) if case["family"] else {}))
    if edges and case["family"]:
        inputs["position_ids"] = torch.cat([torch.arange(b - a) for a, b in zip(edges, edges[1:], strict=False)])[None]
        if case["cu_seq_lens"]:  # which keep states apart too; and then nothing predicts a document's first token
            inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor(edges, dtype=torch.int32))
            labels[:, [edge for edge in edges if edge < case["tokens"]]] = -100
    elif edges:
        inputs["cu_seqlens"] = torch.tensor(edges, dtype=torch.int32)
    return model, inputs


def step(model: torch.nn.Module, *calls: dict) -> dict[str, torch.Tensor]:
    """Loss and gradients, summed over calls; zeros where nothing reaches a parameter."""
    torch.manual_seed(1)
    model.zero_grad()
    total = 0
    for inputs in calls:
        loss = model(**inputs).loss
        if loss.requires_grad:
            loss.backward()
        total += loss.detach()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": total, **grads}


def untouched(case: dict, inputs: dict) -> list[dict]:
    """The calls of a model as it is that come to the same: of a family that knows no cu_seq_lens, a row for each document."""
    if not case["cu_seq_lens"]:
        return [inputs]
    ids, labels = inputs["input_ids"], inputs["labels"]
    rows = [slice(a, b) for a, b in zip(case["edges"], case["edges"][1:], strict=False) if a < b]
    of_all = dict(use_cache=False, num_items_in_batch=max(1, int((labels != -100).sum())))
    return [dict(input_ids=ids[:, row], labels=labels[:, row], **of_all) for row in rows]


def run_case(case: dict, directory: str) -> str:
    """What is wrong with it on this rank, "" if nothing is. Raises whatever a step raises."""
    with InDouble() if case["family"] else nullcontext():
        model, inputs = build(case)
        expected = step(copy.deepcopy(model), *untouched(case, inputs)) if dist.get_rank() == 0 else {}
        offload = case["offload"] and lt.Offload(**case["offload"], host_bytes=2**22, disk=lt.DiskSettings(path=directory, budget=2**24))
        report = lt.apply(model, lt.Plan(**case["plan"], offload=offload), parallel=lt.Parallel(**case["parallel"]))
        try:
            report.check_replay()
            found, again = step(model, inputs), step(model, inputs)
            wrong = [f"left behind: {report.store.names()[:3]}"] if report.store.names() else []
        finally:
            report.undo()  # its groups stay: another one of the same ranks would find the addresses of one that is gone
    wrong += [f"{name}: other bits when done again" for name in found if not torch.equal(found[name], again[name])]
    for grad in list(found.values())[1:]:
        dist.all_reduce(grad)
        grad /= dist.get_world_size() if case["parallel"]["gradients"] == "mean" else 1
    overall = sum(float(t.square().sum()) for t in expected.values()) ** 0.5
    errors = {name: (float((found[name] - of_one).norm()), float(of_one.norm())) for name, of_one in expected.items()}
    for name, (error, norm) in errors.items():
        if not error <= CLOSE * norm + NOISE * overall:
            wrong.append(f"{name}: off by {error:.1e} of {norm:.1e}")
    return "; ".join(wrong[:4])
