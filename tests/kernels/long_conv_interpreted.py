"""The Triton kernels of long convolutions in Triton's interpreter, against convolutions in float64: a process of its own, since Triton
reads TRITON_INTERPRET when a kernel is defined.

    TRITON_INTERPRET=1 python -m tests.kernels.long_conv_interpreted 3 17 order_three    # drawn cases by number, functions below by name
"""

from dataclasses import replace

import torch

from longtrain.ops.long_conv import explain, fft, long_conv, long_conv_backward, triton
from longtrain.ops.long_conv.call import Wanted
from tests.kernels.interpreter import run
from tests.ops.long_conv_cases import Case, directly, draw, error, found, widened

HALF, FLOAT = torch.float16, torch.float32
# A result is rounded some 15 times on its way: rows, matrices, what they make, spectrum, result. Roundings are independent and each is
# at most the dtype's unit roundoff, so the error is below sqrt(15) of them; float32's sums of up to 512 terms count as much again.
TOLERANCE = {HALF: 15**0.5 * 2**-11, FLOAT: 2 * 15**0.5 * 2**-24}
PLAIN = Case(B=1, T=300, E=2, H=2, W=300, causal=True, edges=(0, 300), skip=False, gate_in=False, gate_out=False, dtype=FLOAT, seed=0)
ALL = replace(PLAIN, skip=True, gate_in=True, gate_out=True)


def check(case: Case, direct: bool = True) -> None:
    """Output and all gradients. Long cases are held to torch.fft in float64, itself held to the definition by other tests."""
    call, dy, wanted = case.call()
    assert triton.refuse(call) is None, triton.refuse(call)
    wide = widened(call)
    exact = directly(call, dy, wanted) if direct else found(fft.forward(wide), fft.backward(wide, dy.double(), wanted))
    result = found(triton.forward(call), triton.backward(call, dy, wanted))
    assert set(result) == {"y", "du_BTE", "dk_HW"} | {name for there, name in (
        (case.skip, "dskip_E"), (case.gate_in, "dgate_in_BTE"), (case.gate_out, "dgate_out_BTE")) if there}
    for name, x in result.items():
        assert x.dtype == (FLOAT if name in ("dk_HW", "dskip_E") else case.dtype), name
        assert (off := error(x, exact[name])) <= TOLERANCE[case.dtype], f"{name}: {off:.1e} in {case}"


def drawn(number: int) -> Case:
    return draw(number, HALF if number % 2 else FLOAT, longest=600)


def one_token() -> None:
    for causal in (True, False):
        for dtype in (HALF, FLOAT):
            for W in (1, 2, 9):
                check(replace(ALL, T=1, W=W, edges=(0, 1), causal=causal, dtype=dtype))


def odd_lengths_and_filters_shorter_and_longer() -> None:
    for causal in (True, False):
        for dtype, T, W in ((FLOAT, 255, 511), (HALF, 257, 257), (FLOAT, 513, 40), (HALF, 31, 100)):
            check(replace(PLAIN, T=T, W=W, edges=(0, T), causal=causal, dtype=dtype))


def gates_skip_heads_and_documents() -> None:
    for causal in (True, False):
        for dtype in (HALF, FLOAT):
            check(replace(ALL, B=2, E=4, H=2, causal=causal, edges=(0, 0, 7, 8, 290, 300, 300), dtype=dtype))


def pieces_of_a_document() -> None:
    """Filters much shorter than the document: overlapping rows, read backwards for the inputs' gradients."""
    for causal, dtype in ((True, FLOAT), (False, HALF)):
        case = replace(ALL, T=5003, W=98, edges=(0, 1700, 5003), causal=causal, dtype=dtype)
        work = triton.works(case.call()[0])
        assert any(not w.whole and len(w.pieces) > 2 for w in work)
        check(case, direct=False)


def several_tiles() -> None:
    """Matrices of more rows than a tile, and sizes that are no power of two."""
    for dtype, T, causal in ((FLOAT, 9000, False), (HALF, 17000, True)):
        case = replace(PLAIN, T=T, W=T, edges=(0, T), causal=causal, dtype=dtype, E=1, H=1)
        (work,) = triton.works(case.call()[0])
        assert work.size.rows == 192
        check(case, direct=False)


def order_three() -> None:
    for dtype, causal in ((FLOAT, True), (HALF, False)):
        case = replace(ALL, T=33001, W=33001, edges=(0, 33001), causal=causal, dtype=dtype, E=1, H=1)
        (work,) = triton.works(case.call()[0])
        assert work.size.outer == 3
        check(case, direct=False)


def groups_cut_inside_a_head() -> None:
    """A filter whose channels are in two groups: both add to its gradient."""
    case = replace(ALL, E=20, H=2, T=40, W=50, edges=(0, 40))
    call, dy, wanted = case.call()
    least, workspace, triton.LEAST, triton.WORKSPACE = triton.LEAST, triton.WORKSPACE, 7, 1
    assert [(g.channels.start, g.filters.start, g.filters.stop, g.shift) for g in triton._groups(call)] == [
        (0, 0, 1, 0),
        (7, 0, 2, 7),
        (14, 1, 2, 4),
    ]
    check(case)
    triton.LEAST, triton.WORKSPACE = least, workspace


def only_what_is_wanted() -> None:
    call, dy, wanted = replace(ALL, T=50, W=50, edges=(0, 50)).call()
    every = found(torch.empty(0), triton.backward(call, dy, wanted))
    for name in ("u", "k", "skip", "gate_in", "gate_out"):
        one = triton.backward(call, dy, Wanted(**{n: n == name for n in ("u", "k", "skip", "gate_in", "gate_out")}))
        given = {n: x for n, x in found(torch.empty(0), one).items() if n != "y"}
        assert len(given) == 1
        assert all(torch.equal(x, every[n]) for n, x in given.items()), name


def nan_stays_in_its_row() -> None:
    call, dy, wanted = replace(ALL, B=2, T=60, E=3, H=3, edges=(0, 25, 60), W=60).call()
    call.u_BTE[1, 30, 2] = float("nan")
    y, gradients = triton.forward(call), triton.backward(call, dy, wanted)
    hit = torch.zeros(2, 60, 3, dtype=torch.bool)
    hit[1, 25:, 2] = True
    assert not y[~hit].isnan().any() and y[hit].isnan().all()
    assert not gradients.dk_HW[:2].isnan().any() and gradients.dk_HW[2].isnan().any()
    assert gradients.du_BTE.isfinite().all() and not gradients.dgate_out_BTE[~hit].isnan().any()


def through_the_public_functions() -> None:
    """By name, and by auto only on a GPU: autograd, strided inputs, gradients into given tensors."""
    case = replace(ALL, T=70, W=90, edges=(0, 30, 70))
    call, dy, wanted = case.call()
    assert explain(call.u_BTE, call.k_HW)["triton"] is None
    leaves = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in
              (call.u_BTE, call.k_HW, call.skip_E, call.gate_in_BTE, call.gate_out_BTE)]
    edges = torch.tensor(case.edges)
    y = long_conv(*leaves, cu_seqlens=edges, backend="triton")
    grads = torch.autograd.grad(y, leaves, dy)
    given = dict(du=torch.empty_like(dy), dk=torch.empty_like(leaves[1]))
    long_conv_backward(dy, *(x.detach() for x in leaves), cu_seqlens=edges, backend="triton", **given)
    expected = directly(call, dy, wanted)
    for ours, name in zip((y, *grads), ("y", "du_BTE", "dk_HW", "dskip_E", "dgate_in_BTE", "dgate_out_BTE")):
        assert error(ours.detach(), expected[name]) <= TOLERANCE[FLOAT], name
    assert torch.equal(given["du"], grads[0]) and torch.equal(given["dk"], grads[1])


def what_is_refused() -> None:
    for dtype, why in ((torch.float64, "no float64"), (torch.bfloat16, "interpreter computes bfloat16 wrongly")):
        assert why in triton.refuse(replace(PLAIN, dtype=dtype).call()[0])
    long = torch.empty(1, 5_000_000, 1, device="meta")
    call = triton.Call(
        u_BTE=long,
        k_HW=torch.empty(1, 5_000_000, device="meta"),
        skip_E=None,
        gate_in_BTE=None,
        gate_out_BTE=None,
        causal=True,
        edges=(0, 5_000_000),
    )
    assert triton.works(call) is None and triton.works(replace(call, k_HW=torch.empty(1, 5000, device="meta"))) is not None


if __name__ == "__main__":
    run(lambda number: check(drawn(number)), globals())
