"""The C++ long convolution: every method, instruction set and dtype against direct convolution in float64; 360 drawn cases.

The bound in float32 and below is relative to torch.fft: the error of either is at most that of three transforms of the same length, each of
which adds roundings of some half an ulp a level; ours has as many levels, so its error may be that of the other computed in
the same dtype, times 2, never more. To it comes what is left when the transform happens to be exact (a document of one
token): products with two gates and the skip, and sums of them, eight roundings of float32; and one rounding of the result to its dtype.
"""

import math

import pytest
import torch

from longtrain._extension import MISSING
from longtrain.ops.long_conv import cpp, explain, fft, long_conv, long_conv_backward
from longtrain.ops.long_conv.call import Wanted, build_call
from tests.ops.long_conv_cases import Case, directly, draw, error, found

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
METHODS = ("", "whole", "pieces", "direct")
GATED = dict(skip=True, gate_in=True, gate_out=True)
SETS = cpp.instruction_sets() if MISSING is None else []


def roundings(dtype: torch.dtype) -> float:
    """Eight roundings of float32 and one of `dtype`."""
    return 8 * torch.finfo(torch.float32).eps / 2 + (torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0)


def ours(case: Case, method: str = "", instruction_set: str = "") -> dict[str, torch.Tensor]:
    call, dy, wanted = case.call()
    return found(cpp.forward(call, None, instruction_set, method), cpp.backward(call, dy, wanted, None, instruction_set, method))


def assert_exact(case: Case, method: str = "", instruction_set: str = "") -> None:
    mine, exact = ours(case, method, instruction_set), directly(*case.call())
    for name, x in mine.items():
        apart = error(x, exact[name])
        assert apart <= 2e-14, f"{name}: {apart:.1e} by {method or 'auto'} on {instruction_set or 'auto'}: {case}"


@pytest.mark.parametrize("tenth", range(10))
def test_drawn_cases_in_float64_equal_direct_convolution(tenth):
    for seed in range(tenth, 180, 10):
        assert_exact(draw(seed, torch.float64, longest=700), METHODS[seed // 10 % 4])


@pytest.mark.parametrize("instruction_set", SETS)
def test_documents_that_meet_different_numbers_of_taps_share_pieces(instruction_set):
    """Documents shorter than the filter, of different lengths, cut into pieces of one size."""
    for seed in (10, 47, 50, 92, 98, 146):
        assert_exact(draw(seed, torch.float64, longest=700), "pieces", instruction_set)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tenth", range(10))
def test_drawn_cases_are_as_accurate_as_torch_fft(tenth, dtype):
    for seed in range(1000 + tenth, 1060, 10):
        case = draw(seed, dtype, longest=700)
        call, dy, wanted = case.call()
        exact, torchs = directly(call, dy, wanted), found(fft.forward(call), fft.backward(call, dy, wanted))
        for name, x in ours(case, METHODS[seed // 10 % 4]).items():
            assert x.dtype == torchs[name].dtype
            allowed = 2 * error(torchs[name], exact[name]) + roundings(x.dtype)
            assert error(x, exact[name]) <= allowed, f"{name}: {error(x, exact[name]):.1e}, allowed {allowed:.1e}: {case}"


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("method", METHODS[1:])
def test_every_instruction_set(method, instruction_set):
    for T, W in ((1, 1), (257, 31), (640, 640), (705, 300)):
        for causal in (True, False):
            case = Case(B=2, T=T, E=9, H=9, W=W, causal=causal, edges=(0, T // 3, T), **GATED, dtype=torch.float64, seed=1)
            assert_exact(case, method, instruction_set)


@pytest.mark.parametrize("odd", [1, 3, 5, 7, 9])
def test_every_transform_size(odd):
    """Just fitting and just not fitting: 2N = 128 odd 2^a with lanes of 8 doubles; down all branches of the tree of radices."""
    for T in (64 * odd, 64 * odd + 1, 128 * odd):
        case = Case(B=1, T=T, E=2, H=2, W=T, causal=True, edges=(0, T), **GATED, dtype=torch.float64, seed=2)
        assert_exact(case, "whole")


@pytest.mark.slow
@pytest.mark.parametrize("T", [16384, 40000, 65536, 131072])
def test_long_sequences_against_torch_fft_in_float64(T):
    """Sizes whose tree leaves the first-level cache, in both dtypes; direct convolution is quadratic, so torch.fft in float64 measures."""
    g = torch.Generator().manual_seed(0)
    u, k, dy = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((1, T, 3), (3, T), (1, T, 3)))
    wanted = Wanted(u=True, k=True, skip=False, gate_in=False, gate_out=False)
    exact_call = build_call(u, k, None, None, None, True, None)
    exact = found(fft.forward(exact_call), fft.backward(exact_call, dy, wanted))
    wide = found(cpp.forward(exact_call), cpp.backward(exact_call, dy, wanted))
    call = build_call(u.float(), k.float(), None, None, None, True, None)
    mine = found(cpp.forward(call), cpp.backward(call, dy.float(), wanted))
    torchs = found(fft.forward(call), fft.backward(call, dy.float(), wanted))
    for name in exact:
        assert error(wide[name], exact[name]) <= 1e-14, name
        assert error(mine[name], exact[name]) <= 2 * error(torchs[name], exact[name]), name


def test_the_method_is_chosen_by_cost():
    """A filter of four taps costs what four taps cost, whatever the length; seen by the bits, which differ between the methods."""
    def bits(W: int, method: str) -> torch.Tensor:
        g = torch.Generator().manual_seed(0)
        call = build_call(torch.randn(1, 4000, 16, generator=g), torch.randn(16, W, generator=g), None, None, None, True, None)
        return cpp.forward(call, method=method)

    for W, chosen in ((4, "direct"), (600, "pieces"), (4000, "whole")):
        assert [torch.equal(bits(W, ""), bits(W, method)) for method in METHODS[1:]] == [method == chosen for method in METHODS[1:]], W


@pytest.mark.parametrize("H", [1, 2, 40])
@pytest.mark.parametrize("method", METHODS[1:])
def test_threads_do_not_change_a_bit(method, H):
    case = Case(B=2, T=600, E=40, H=H, W=100, causal=True, edges=(0, 250, 600), **GATED, dtype=torch.float32, seed=3)
    one = ours(case, method)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 2)
    try:
        several = ours(case, method)
    finally:
        torch.set_num_threads(threads)
    for name, x in one.items():
        assert torch.equal(x, several[name]), name


def test_only_what_is_wanted():
    case = Case(B=1, T=300, E=5, H=5, W=300, causal=True, edges=(0, 300), **GATED, dtype=torch.float64, seed=4)
    call, dy, _ = case.call()
    exact = directly(*case.call())
    for method in METHODS[1:]:
        for name in ("u", "k", "skip", "gate_in", "gate_out"):
            flags = {n: n == name for n in ("u", "k", "skip", "gate_in", "gate_out")}
            gradients = found(torch.empty(0), cpp.backward(call, dy, Wanted(**flags), method=method))
            (key,) = set(gradients) - {"y"}
            assert error(gradients[key], exact[key]) < 1e-13, (method, name)


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0)])
def test_nothing_to_do(shape):
    u = torch.randn(shape, requires_grad=True)
    k = torch.randn(max(1, shape[2]) if shape[2] else 0, 3)
    if shape[2] == 0:
        assert long_conv(u, k).shape == shape
        return
    k.requires_grad_()
    y = long_conv(u, k)
    assert y.shape == shape
    y.sum().backward()
    assert torch.equal(k.grad, torch.zeros_like(k))


def test_strides():
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 300, 3, 8, generator=g)
    u, gate = wide[:, :, 1], wide[:, :, 2]
    k = torch.randn(8, 600, generator=g)[:, ::2]
    for x in (u, u.transpose(0, 1).contiguous().transpose(0, 1), u.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(long_conv(x, k, gate_in=gate), long_conv(u.contiguous(), k.contiguous(), gate_in=gate.contiguous()))
    u = u.detach().requires_grad_()
    expanded = torch.autograd.grad(long_conv(u, k).sum(), u)[0]
    assert torch.equal(expanded, torch.autograd.grad(long_conv(u, k), u, torch.ones_like(u))[0])


@pytest.mark.parametrize("backend", ["cpp", "fft", "reference"])
def test_a_group_of_channels_is_written_in_place(backend):
    """`out` and the gradients are strided views of larger tensors; what lies beside them stays as it is."""
    case = Case(B=2, T=300, E=6, H=3, W=300, causal=False, edges=(0, 120, 300), **GATED, dtype=torch.float32, seed=5)
    call, dy, wanted = case.call()
    arguments = dict(u=call.u_BTE, k=call.k_HW, skip=call.skip_E, gate_in=call.gate_in_BTE, gate_out=call.gate_out_BTE, causal=False,
                     cu_seqlens=torch.tensor(case.edges), backend=backend)
    frames = {name: torch.full((2, 300, 10), 7.0) for name in ("out", "du", "dgate_in", "dgate_out")}
    views = {name: x[:, :, 2:8] for name, x in frames.items()}
    dk, dskip = torch.full((3, 300), 7.0), torch.full((6,), 7.0)
    assert long_conv(**arguments, out=views.pop("out")) is not None
    long_conv_backward(dy, **arguments, **views, dk=dk, dskip=dskip)
    exact = directly(call, dy, wanted)
    for x, name in zip(frames.values(), ("y", "du_BTE", "dgate_in_BTE", "dgate_out_BTE"), strict=True):
        assert error(x[:, :, 2:8], exact[name]) < 1e-6 and x[:, :, :2].eq(7).all() and x[:, :, 8:].eq(7).all()
    assert error(dk, exact["dk_HW"]) < 1e-6 and error(dskip, exact["dskip_E"]) < 1e-6


@pytest.mark.parametrize("change,message", [
    (dict(dk=torch.empty(3, 9).bfloat16()), "dk: found torch.bfloat16, expected torch.float32"),
    (dict(du=torch.empty(1, 9, 2)), r"du: found shape \(1, 9, 2\)"),
    (dict(dskip=torch.empty(3)), "dskip: found a tensor, expected None, since skip is None"),
    (dict(dy=torch.empty(1, 8, 3)), "dy: found shape"),
    (dict(backend="monarch"), "backend: found 'monarch'"),
])
def test_bad_input_to_the_backward_is_named(change, message):
    with pytest.raises(ValueError, match=f"long_conv: {message}"):
        long_conv_backward(**dict(dy=torch.ones(1, 9, 3), u=torch.ones(1, 9, 3), k=torch.ones(3, 9), du=torch.empty(1, 9, 3)) | change)


def test_out_is_refused_where_gradients_are_wanted():
    u = torch.ones(1, 9, 3, requires_grad=True)
    with pytest.raises(ValueError, match="long_conv: out: found a tensor where gradients are wanted"):
        long_conv(u, torch.ones(3, 9), out=torch.empty(1, 9, 3))


def test_kernels_serve_mixed_filter_dtypes_and_refuse_the_rest():
    call = dict(u=torch.randn(1, 90, 4, dtype=torch.bfloat16), k=torch.randn(4, 90))
    assert explain(**call)["cpp"] is None
    assert torch.equal(long_conv(**call | {"k": call["k"].bfloat16()}), long_conv(**call | {"k": call["k"].bfloat16().float()}))
    assert "float64 arithmetic" in explain(**call | {"k": call["k"].double()})["cpp"]
    assert "gate_out is" in explain(**call, gate_out=torch.ones(1, 90, 4))["cpp"]


def test_compiled_whole_without_breaks():
    def layer(u, k, skip, gate):
        return long_conv(u * 2, k, skip, gate_out=gate, cu_seqlens=torch.tensor([0, 10, 40])).sin()

    def gradients(f):
        shapes = ((1, 40, 4), (4, 20), (4,), (1, 40, 4))
        leaves = [torch.linspace(-1, 1, math.prod(shape)).view(shape).requires_grad_() for shape in shapes]
        y = f(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    torch._dynamo.reset()
    for a, b in zip(gradients(torch.compile(layer, fullgraph=True, backend="aot_eager")), gradients(layer)):
        assert torch.equal(a, b)


def test_custom_ops_obey_the_rules_of_torch():
    g = torch.Generator().manual_seed(0)
    u, k = torch.randn(1, 12, 3, generator=g, requires_grad=True), torch.randn(3, 5, generator=g, requires_grad=True)
    torch.library.opcheck(torch.ops.longtrain.long_conv, (u, k, None, None, None, None, True, "auto"))
    torch.library.opcheck(torch.ops.longtrain.long_conv_backward, (u.detach(), u.detach(), k.detach(), None, None, None, None, True, "auto",
                                                                  [True, True, False, False, False]))
