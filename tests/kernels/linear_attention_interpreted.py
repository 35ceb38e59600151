"""The Triton kernels of linear attention in Triton's interpreter, against the recurrence in float64: a process of its own, since Triton
reads TRITON_INTERPRET when a kernel is defined.

    TRITON_INTERPRET=1 python -m tests.kernels.linear_attention_interpreted 3 17 documents    # drawn cases by number, functions by name
"""

import random
from functools import partial

import torch

from longtrain.ops.linear_attention import chunked, explain, linear_attention_backward
from tests.kernels.interpreter import run
from tests.ops.linear_attention_cases import F64, KINDS, output_and_grads
from tests.ops.linear_attention_cases import make as make_call

FLOAT, HALF = torch.float32, torch.float16
make = partial(make_call, B=1, T=70, H=1, D=16, V=16, dtype=FLOAT, strength=0.3)


def errors(ours, exact):
    scale = max(float(x.norm()) for x in exact.values())
    # what is 0 by mathematics (the decay of one token) is noise, held to the whole
    return {
        n: float((ours[n].double() - exact[n]).norm()) / (float(exact[n].norm()) if exact[n].norm() > 1e-7 * scale else scale)
        for n in exact
    }


def check(data, **options):
    """No further from float64 than twice the recurrence on the same numbers in float32 (or 16 roundings, where that happens to be exact),
    and what is returned in 16 bits rounded once more."""
    explained = dict(data) | {n: x for n, x in options.items() if n != "chunk_size"}
    assert explain(**explained)["triton"] is None, explain(**explained)
    exact = output_and_grads({n: x.double() for n, x in data.items()}, **options, backend="reference")
    plain = errors(output_and_grads({n: x.float() for n, x in data.items()}, **options, backend="reference"), exact)
    ours = output_and_grads(data, **options, backend="triton")
    for name, error in errors(ours, exact).items():
        dtype = FLOAT if name == "state" else data["q"].dtype
        assert ours[name].dtype == dtype, name
        allowed = max(2 * plain[name], 16 * 2**-24) + (2**-11 if dtype == HALF else 0)
        shapes = {n: list(x.shape) for n, x in data.items()}
        assert error <= allowed, f"{name}: {error:.1e} against {allowed:.1e}; {shapes}, {options}, {data['q'].dtype}"


def drawn(number):
    draw = random.Random(number)
    T = draw.choice([1, 2, 15, 16, 17, 31, 33, 64, 65, draw.randint(1, 140)])
    data = make(
        B=draw.choice([1, 1, 2]), T=T, H=draw.choice([1, 2]), D=draw.choice([1, 5, 16, 20, 64]), V=draw.choice([1, 7, 16, 80]),
        forget=draw.choice(KINDS), beta=draw.random() < 0.5, state=draw.random() < 0.5, strength=draw.choice([1e-3, 0.3, 5.0, 300.0]),
        seed=number, dtype=HALF if draw.random() < 0.3 else FLOAT,
    )  # fmt: skip
    if "beta" in data and data["q"].shape[3] < 16:  # keys that are nearly all parallel cost the system of a chunk a digit
        data = make(T=T, D=16, forget=draw.choice(KINDS), beta=True, seed=number)
    options = dict(chunk_size=draw.choice([1, 16, 32, 64]), scale=draw.choice([None, 0.3]))
    if draw.random() < 0.5:
        options["cu_seqlens"] = torch.tensor([0, *sorted(draw.randint(0, T) for _ in range(draw.randint(1, 4))), T])
    return data, options


def check_drawn(number):
    data, options = drawn(number)
    check(data, **options)


def every_decay_with_and_without_the_delta_rule():
    for forget in KINDS:
        for beta in (False, True):
            check(make(T=37, forget=forget, beta=beta, state=True), chunk_size=16)


def one_token_and_none():
    for forget, beta in ((None, False), ("feature", True), ("head", True)):
        check(make(T=1, H=2, forget=forget, beta=beta, state=True))
    data = make(T=0, forget="head", beta=True, state=True)
    result = output_and_grads(data, backend="triton")
    assert result["out"].shape == (1, 0, 1, 16) and torch.equal(result["state"], data["initial_state"])


def documents():
    for forget, beta in ((None, True), ("feature", False)):
        check(make(B=2, T=50, H=2, forget=forget, beta=beta), cu_seqlens=torch.tensor([0, 0, 7, 8, 33, 50, 50]))


def strong_decays_lose_nothing_that_is_near():
    for kind in ("head", "feature"):
        data = make(T=64, forget=kind)
        data["decay"] = torch.full_like(data["decay"], -1e-4)
        data["decay"][:, 10] = -1e5
        data["decay"][:, 40] = -torch.inf
        check(data)


def pieces_change_nothing():
    whole, kept = output_and_grads(make(T=70, forget="head", beta=True, state=True), backend="triton", chunk_size=16), chunked.PIECE_TOKENS
    chunked.PIECE_TOKENS = {"cpu": 32, "other": 32}
    data = make(T=70, forget="head", beta=True, state=True)
    for name, x in output_and_grads(data, backend="triton", chunk_size=16).items():
        assert torch.equal(x, whole[name]), name
    dout, dstate = torch.randn(1, 70, 1, 16), torch.randn(1, 1, 16, 16)
    ours, theirs = (linear_attention_backward(dout, **data, dstate=dstate, chunk_size=16, backend=b) for b in ("triton", "chunked"))
    chunked.PIECE_TOKENS = kept
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def strides_do_not_matter():
    data = make(B=2, T=20, H=2, forget="feature", beta=True, state=True)
    strided = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in data.items()}
    for (name, a), b in zip(output_and_grads(strided, backend="triton").items(), output_and_grads(data, backend="triton").values()):
        assert torch.equal(a, b), name


def what_is_refused():
    for change, why in (
        (dict(dtype=F64), "no float64"),
        (dict(D=130), "130 key features are above 128"),
        (dict(dtype=torch.bfloat16), "wrongly"),
    ):
        assert why in explain(**make(T=3, **change))["triton"]


if __name__ == "__main__":
    run(check_drawn, globals())
