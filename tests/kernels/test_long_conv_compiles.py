"""Long convolutions by Triton kernels without a GPU: every kernel compiles to a cubin, fits, spills next to nothing, and multiplies on
tensor cores."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install longtrain[gpu]")
from longtrain.ops.long_conv import triton
from longtrain.ops.long_conv.call import Call, Gradients
from tests.kernels.compiled import compiled

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SPILLED = 96
"""Bytes of a thread at most: Triton 3.6 spills up to 24 registers of `monarch_correlate` on small inputs, 3.9 eight of `monarch_convolve`
on sm_80 and of nothing else."""
PRODUCTS = ("monarch_spectrum", "monarch_convolve", "monarch_correlate", "monarch_outer")


def call(T: int, dtype: torch.dtype, *, causal: bool = True, gated: bool = True, W: int | None = None) -> Call:
    def empty(*shape: int, dtype=dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    gates = [empty(1, T, 64) if gated else None for _ in range(2)]
    return Call(
        u_BTE=empty(1, T, 64),
        k_HW=empty(64, W or T, dtype=torch.float32),
        skip_E=empty(64, dtype=torch.float32) if gated else None,
        gate_in_BTE=gates[0],
        gate_out_BTE=gates[1],
        causal=causal,
        edges=(0, T),
    )


def launches(call: Call) -> dict[tuple, triton.Launch]:
    """Each kernel of a forward and a backward once for every set of its options."""
    like = torch.empty_like(call.u_BTE)
    gate = like if call.gate_in_BTE is not None else None
    found = Gradients(du_BTE=like, dk_HW=torch.empty_like(call.k_HW), dgate_in_BTE=gate, dgate_out_BTE=gate)
    sums = torch.empty(1, 64, device="meta")
    every = [*triton.forward_launches(call, like), *triton.backward_launches(call, like, found), triton._skip_sums(call, like, sums)]
    kinds = {}
    for launch in every:
        options = tuple((name, value) for name, value in launch.arguments.items() if name.isupper() or value is None)
        kinds.setdefault((launch.kernel.__name__, *options), launch)
    return kinds


def check(launch: triton.Launch, capability: int):
    found, name = compiled(launch, capability), launch.kernel.__name__
    what = {n: v for n, v in launch.arguments.items() if n.isupper()}
    print(f"sm_{capability} {name} {what}: {found.registers} registers, {found.shared} bytes shared, {found.spilled} spilled")
    assert found.shared <= SHARED[capability], (name, found.shared)
    assert found.spilled <= SPILLED, (name, found.spilled)
    if name in PRODUCTS:
        assert ("mma" in found.ptx) and "fma.rn.f64" not in found.ptx
    return found


def test_a_fused_forward_of_16k_in_bf16_compiles_for_sm_90():
    (launch,) = (x for (name, *_), x in launches(call(16384, torch.bfloat16, gated=False)).items() if name == "monarch_convolve"
                 and not x.arguments["CONJUGATE"])
    assert "wgmma.mma_async" in check(launch, 90).ptx


CALLS = {
    "order 2": (32768, {}),
    "order 2, small": (256, {}),
    "order 2, two-sided": (16384, {"causal": False}),
    "order 2, 64 columns": (4096, {}),
    "order 3": (1 << 22, {"gated": False}),
    "order 3, two-sided": (50000, {"causal": False}),
    "pieces": (1 << 20, {"W": 128, "gated": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", CALLS)
def test_every_kernel_compiles(capability, dtype, case):
    T, options = CALLS[case]
    for launch in launches(call(T, dtype, **options)).values():
        check(launch, capability)
