"""The Triton kernels without a GPU: every variant compiles to a cubin, fits, and is made of the right instructions."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install longtrain[gpu]")
from longtrain.kernels.attention_configs import candidates
from longtrain.ops.attention import triton
from longtrain.ops.attention.interface import checked_call
from tests.kernels.compiled import compiled

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
KERNELS = ("forward", "dk_dv", "dq")
OPTIONS = {
    "causal": {},
    "all keys": {"causal": False},
    "window": {"window_size": (1000, 0)},
    "sinks and kept blocks": {"window_size": (1000, 0), "sink_tokens": 4, "block_stride": 8},
    "documents": {"cu_seqlens_q": torch.tensor([0, 1000, 4096])},
    "documents with kept blocks": {"cu_seqlens_q": torch.tensor([0, 1000, 4096]), "window_size": (100, 0), "block_stride": 8},
    "softcap": {"softcap": 30.0},
    "dropout": {"dropout_p": 0.1, "dropout_seed": 5},
    "softcap and dropout": {"softcap": 30.0, "dropout_p": 0.1, "dropout_seed": 5},
    "sink logits": {"sink_logits": torch.zeros(32, device="meta")},
    "negative scale": {"scale": -0.1},
    "no scale": {"scale": 0.0},
}


def launches(kernel: str, capability: int, dim: int = 128, value_dim: int | None = None, dtype=torch.bfloat16, group: int = 4, **options):
    """(tiles, launch) of a kernel with every choice of tiles, on tensors without memory."""
    T, H, V = 4096, 32, value_dim or dim

    def empty(*shape: int, dtype=dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v, out = empty(1, T, H, dim), empty(1, T, H // group, dim), empty(1, T, H // group, V), empty(1, T, H, V)
    call = checked_call(q, k, v, **{"causal": True, **options})
    rows = empty(1, H, T, dtype=torch.float32)
    dk, dv = (empty(*x.shape, dtype=torch.float32) for x in (k, v))
    for tiles in candidates(kernel, (capability // 10, 0), triton.widest(call), dtype.itemsize):
        if kernel == "forward":
            yield tiles, triton.forward_launch(call, tiles, q, k, v, options.get("sink_logits"), out, rows)
        elif kernel == "dq":
            yield tiles, triton.dq_launch(call, tiles, q, k, v, out, rows, rows, q)
        else:
            yield from ((tiles, launch) for launch in triton.dk_dv_launches(call, tiles, q, k, v, out, rows, rows, dk, dv))


def check(launch, capability: int, main: bool = False):
    found = compiled(launch, capability)
    assert found.shared <= SHARED[capability], found.shared
    if main:
        assert found.spilled == 0, found.spilled
        expected = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
        assert expected in found.ptx
    return found


@pytest.mark.parametrize("kernel,capability,dim", [("forward", 90, 128), ("dk_dv", 90, 128), ("dq", 80, 64)])
def test_default_tiles_of_main_variants_do_not_spill(kernel, capability, dim):
    _, launch = next(iter(launches(kernel, capability, dim)))
    check(launch, capability, main=True)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dim", [64, 128])
def test_no_tiles_of_main_variants_spill(kernel, capability, dim):
    for tiles, launch in launches(kernel, capability, dim):
        found = check(launch, capability, main=True)
        print(f"sm_{capability} D{dim} {kernel} {tiles}: {found.registers} registers, {found.shared} bytes shared")


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_compiles(kernel, capability, options):
    found = list(launches(kernel, capability, **options))
    for _, launch in (choice for choice in found if choice[0] == found[0][0]):
        check(launch, capability)


HEADS = {
    torch.bfloat16: ((1, 5, 1), (16, 16, 1), (72, 40, 8), (192, 128, 1), (256, 256, 2)), torch.float16: ((128, 128, 1),),
    torch.float32: ((64, 64, 1), (128, 128, 1), (256, 256, 1)),
}  # head dim, value dim, query heads of a kv head


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", HEADS)
def test_every_head_size_and_dtype_compiles(kernel, capability, dtype):
    for dim, value_dim, group in HEADS[dtype]:
        for _, launch in launches(kernel, capability, dim, value_dim, dtype, group):
            check(launch, capability)
