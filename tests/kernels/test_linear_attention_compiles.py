"""Linear attention by Triton kernels without a GPU: every variant compiles to a cubin and fits.

In bf16, heads of 64 features spill at most two registers a thread, but for the gradients of the delta rule: at most 66 (264 bytes, on
sm_80 with decays by feature). What float32 (tf32 in three parts) and wider heads spill is printed, and bounded in those gradients;
the most is 7,552 bytes, of linear_out with 128 features in float32 on sm_80. Where much is missing, ptxas falls back to 32 registers and
spills nearly everything, so that registers have a bound as well.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install longtrain[gpu]")
from longtrain.ops.linear_attention import triton
from longtrain.ops.linear_attention.call import checked
from tests.kernels.compiled import compiled

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def launches(D: int, V: int, dtype: torch.dtype, features: int, delta: bool) -> list:
    def empty(*shape: int, dtype=dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    B, T, H = 1, 1024, 4
    q, v = empty(B, T, H, D), empty(B, T, H, V)
    decay = (None, empty(B, T, H), empty(B, T, H, D))[features]
    call = checked(q, q, v, decay, empty(B, T, H) if delta else None, None, None, None, 64)
    state, entries = empty(B, H, D, V, dtype=torch.float32), empty(B, 1, H, D, V, dtype=torch.float32)
    grads = [None if x is None else torch.empty_like(x) for x in (q, q, v, call.decay_BTHG, call.beta_BTH)]
    return [*triton.forward_launches(call, v, state, entries), *triton.backward_launches(call, entries, v, state, grads)]


def check(launch, capability: int) -> None:
    found, what = compiled(launch, capability), {n: x for n, x in launch.arguments.items() if n.isupper()}
    print(
        f"sm_{capability} {launch.kernel.__name__} {what}: {found.registers} registers, {found.shared} bytes shared, "
        f"{found.spilled} spilled"
    )
    assert found.shared <= SHARED[capability], (launch.kernel.__name__, found.shared)
    delta_grads = launch.kernel.__name__ == "linear_grads" and launch.arguments["beta"] is not None
    if launch.arguments["DIM"] <= 64 and launch.arguments["k"].dtype != torch.float32:
        assert found.spilled <= (264 if delta_grads else 8), (launch.kernel.__name__, found.spilled)
    elif delta_grads:
        assert found.spilled <= 2304 and found.registers >= 128, (launch.kernel.__name__, found.spilled)


def test_the_pass_along_the_chunks_compiles():
    (launch,) = (x for x in launches(64, 64, torch.bfloat16, 1, False)[:1])
    check(launch, 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("features, delta", [(0, False), (1, False), (2, False), (0, True), (1, True), (2, True)])
def test_every_kernel_compiles(capability, dtype, features, delta):
    for D, V in ((64, 64), (128, 128)):
        for launch in launches(D, V, dtype, features, delta):
            check(launch, capability)
