"""Calls of linear attention, drawn at random or made to order, and how far two results are apart."""

import random

import torch
import torch.nn.functional as F

from longtrain.ops.linear_attention import linear_attention

F64 = torch.float64
KINDS = (None, "fixed", "head", "feature")
"""Decays: none, `[H]`, `[B, T, H]`, `[B, T, H, D]`."""


def relative(a, b):
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp_min(1e-300))


def make(B=2, T=37, H=2, D=5, V=3, forget=None, beta=False, state=False, dtype=F64, seed=0, strength=1.0):
    """Tensors of a call. `forget`: None, "fixed" [H], "head" [B, T, H] or "feature" [B, T, H, D]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    data = dict(q=normal(B, T, H, D), k=F.normalize(normal(B, T, H, D), dim=-1), v=normal(B, T, H, V))
    shape = {None: None, "fixed": (H,), "head": (B, T, H), "feature": (B, T, H, D)}[forget]
    if shape is not None:
        data["decay"] = -normal(*shape).exp() * strength
    if beta:
        data["beta"] = 2 * normal(B, T, H).sigmoid()
    if state:
        data["initial_state"] = normal(B, H, D, V)
    return {name: t.to(dtype) for name, t in data.items()}


def upstream(out, state):
    """Random gradients of both, rounded so that all dtypes get the same."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, generator=generator, dtype=F64).to(torch.bfloat16).to(t.dtype) for t in (out, state)]


def output_and_grads(data, **options):
    """Output, last state and the gradients of everything, for the `upstream` ones."""
    leaves = {name: t.clone().requires_grad_() for name, t in data.items()}
    out, state = linear_attention(**leaves, return_state=True, **options)
    grads = torch.autograd.grad((out, state), list(leaves.values()), upstream(out, state))
    return {"out": out.detach(), "state": state.detach(), **dict(zip(leaves, grads))}


def assert_same(ours, theirs, tolerance=1e-12):
    assert ours.keys() == theirs.keys()
    scale = max(float(t.detach().double().norm()) for t in theirs.values())
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape, name
        a, b = ours[name].detach().double(), theirs[name].detach().double()
        error, norm = float((a - b).norm()), float(b.norm())
        # zero by mathematics (decays of one token, states behind a document): noise, held to the whole
        assert error <= tolerance * (norm if norm > 1e-10 * scale else scale), f"{name}: {error / max(norm, 1e-300):.2e}"


def drawn(case, tokens=None):
    """A call drawn at random, over what breaks; of so many tokens, if given."""
    draw = random.Random(case)
    tokens = tokens or draw.choice([1, 2, 3, 7, 15, 16, 17, 31, 33, 50, 64, 65, draw.randint(1, 90)])
    data = make(
        B=draw.choice([1, 1, 2]), T=tokens, H=draw.choice([1, 2, 3]), D=draw.choice([1, 2, 4, 5, 8]), V=draw.choice([1, 3, 4, 7]),
        forget=draw.choice([None, "fixed", "head", "feature", "feature"]), beta=draw.random() < 0.5, state=draw.random() < 0.5,
        strength=draw.choice([1e-3, 0.3, 5.0, 300.0]), seed=case,
    )  # fmt: skip
    options = dict(chunk_size=draw.choice([1, 2, 4, 16, 16, 64]), scale=draw.choice([None, 0.3]))
    if draw.random() < 0.5:
        inner = sorted(draw.randint(0, tokens) for _ in range(draw.randint(1, 4)))
        options["cu_seqlens"] = torch.tensor([0, *inner, tokens], dtype=draw.choice([torch.int32, torch.int64]))
    return data, options
