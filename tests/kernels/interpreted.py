"""The Triton kernels in Triton's interpreter, against the reference: a process of its own, since Triton reads
TRITON_INTERPRET when a kernel is defined.

    TRITON_INTERPRET=1 python -m tests.kernels.interpreted 3 17 no_query_or_no_key    # drawn cases by number, functions below by name
"""


import torch

from longtrain.kernels.attention_configs import Tiles
from longtrain.ops.attention import attention, attention_backward, triton
from longtrain.ops.attention.interface import checked_call
from tests.kernels.interpreter import run
from tests.ops.attention_cases import assert_close, drawn_case, forward_backward

# Several tiles in small cases; through pointers and through tensor descriptors.
TILES = (Tiles(32, 32, 4, 1), Tiles(16, 64, 4, 1), Tiles(64, 32, 4, 1, True), Tiles(32, 64, 4, 1, True))
# float32: as for the C++ kernels. float16: three roundings (p, ds, the result) of 2^-11 each, less than 2^-9 in all.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2**-9}


def through_kernels(tensors: dict, options: dict, tiles: Tiles) -> dict:
    """The kernels' results, with these tiles; dk and dv begin with something and are strided."""
    q, k, v, dout, sink_logits, dlse = (tensors[name] for name in ("q", "k", "v", "dout", "sink_logits", "dlse"))
    call = checked_call(q, k, v, sink_logits=sink_logits, **options)
    assert triton.refuse(call) is None
    out, lse = triton.forward(call, q, k, v, sink_logits, tiles)
    delta = triton.row_delta(call, dout, out, None if dlse is None else dlse.float())
    dk, dv = (torch.full((*x.shape[:3], x.shape[3] + 2), 0.5)[..., 1:-1] for x in (k, v))
    dq = triton.backward(call, dout, q, k, v, out, lse, delta, dk, dv, tiles)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk - 0.5, "dv": dv - 0.5}


def check_against_reference(tensors: dict, options: dict, tiles: Tiles) -> None:
    dtype = tensors["q"].dtype
    expected = forward_backward({name: None if x is None else x.double() for name, x in tensors.items()}, options, "reference")
    expected.pop("dsink", None)  # made of lse and delta, outside the kernels
    try:
        assert_close(through_kernels(tensors, options, tiles), expected, TOLERANCE[dtype])
    except AssertionError as error:
        raise AssertionError(f"{dtype}, {tiles}, {options}: {error}") from error


def drawn_case_equals_the_reference(number: int) -> None:
    drawn, options = drawn_case(number, torch.float16 if number % 3 == 0 else torch.float32, longest=130)
    check_against_reference(drawn, options, TILES[number % len(TILES)])


def tensors_of(T: int, S: int, heads: int = 1) -> dict:
    q, k, v, dout = (torch.randn(1, n, h, 16) for n, h in ((T, heads), (S, 1), (S, 1), (T, heads)))
    return {"q": q, "k": k, "v": v, "dout": dout, "sink_logits": None, "dlse": None}


def every_alignment_of_mask_and_tiles() -> None:
    for offset in range(4):
        for options in ({"q_offset": 30 + offset}, {"q_offset": 30, "window_size": (13 + offset, 0)}):
            check_against_reference(tensors_of(32, 64), {"causal": True, **options}, Tiles(16, 16, 4, 1))


def sinks_and_kept_blocks_outside_the_window() -> None:
    edges = torch.tensor([0, 31, 70])
    for options in (
        {"causal": True, "window_size": (9, 0)},
        {"causal": True, "window_size": (9, 0), "cu_seqlens_q": edges, "cu_seqlens_k": edges},
        {"causal": False, "window_size": (9, 5), "k_offset": -3, "q_offset": 10},
    ):
        for special in ({"sink_tokens": 10}, {"block_stride": (8, 3)}, {"sink_tokens": 10, "block_stride": (4, 2)}):
            check_against_reference(tensors_of(70, 70), options | special, Tiles(32, 32, 4, 1))


def nan_reaches_only_rows_that_see_it() -> None:
    T, at, window = 100, 41, 20
    rows = torch.arange(T)
    for name in ("q", "k", "v", "dout"):
        tensors = tensors_of(T, T, heads=2)
        tensors[name][0, at] = float("nan")
        found = through_kernels(tensors, {"causal": True, "window_size": (window, 0)}, TILES[0])
        hit = {name: ~x[0].isfinite().all(-1).all(-1) for name, x in found.items() if name != "lse"}
        itself, after, before = rows == at, (rows >= at) & (rows <= at + window), (rows <= at) & (rows >= at - window)
        near = (rows >= at - window) & (rows <= at + window)
        assert torch.equal(hit["out"], {"q": itself, "dout": rows < 0}.get(name, after)), name
        assert torch.equal(hit["dq"], itself if name in ("q", "dout") else after), name
        for gradient in ("dk", "dv"):
            assert not hit[gradient][~near].any(), (name, gradient)
            if name in ("q", "dout") and (gradient, name) != ("dv", "q"):
                assert torch.equal(hit[gradient], before), (name, gradient)


def autograd_and_the_functional_pair_agree() -> None:
    """Through the public functions, by name: the op, its gradient, sinks and a gradient of the LSE."""
    q, k, v, sinks = (torch.randn(1, 20, heads, 16) for heads in (4, 2, 2, 1))
    sinks = sinks[0, :4, 0, 0]
    inputs = [x.requires_grad_() for x in (q, k, v, sinks)]
    found = []
    for backend in ("triton", "reference"):
        options = {"causal": True, "sink_logits": inputs[3], "window_size": (7, 0), "backend": backend}
        out, lse = attention(*inputs[:3], return_lse=True, **options)
        found.append(torch.autograd.grad(out.square().sum() + lse.sum(), inputs))
        with torch.no_grad():
            dk, dv = torch.ones_like(k), torch.ones_like(v)
            attention_backward(2 * out, q, k, v, out, lse, dk=dk, dv=dv, dlse=torch.ones_like(lse), **options)
        torch.testing.assert_close(dk - 1, found[-1][1], rtol=1e-5, atol=1e-5)
    for ours, expected in zip(*found):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def no_query_or_no_key() -> None:
    for T, S in ((0, 5), (5, 0), (0, 0)):
        found = through_kernels(tensors_of(T, S), {"causal": True}, TILES[0])
        assert all(not found[name].any() for name in ("out", "dq", "dk", "dv")) and found["lse"].isneginf().all()
    no_document = {"cu_seqlens_q": torch.tensor([0]), "window_size": (3, 0), "sink_tokens": 2}
    assert through_kernels(tensors_of(0, 0), {"causal": True, **no_document}, TILES[0])["out"].shape == (1, 0, 1, 16)


if __name__ == "__main__":
    run(drawn_case_equals_the_reference, globals())
