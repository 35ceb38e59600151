"""Tile sizes of the attention kernels: a small set for each kernel and kind of GPU. The first is the default; the others are
tried where timing is allowed (`longtrain/ops/attention/triton.py`). Chosen so that nothing spills up to a head dim of 128
(`tests/kernels/test_attention_compiles.py`), not yet by speed on a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiles:
    """Queries and keys of a tile, warps of a program, stages of the software pipeline."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    boxes: bool = False
    """Load whole tiles through tensor descriptors (TMA, from sm_90 on)."""


# Compute capability's major number -> kernel -> widest padded head dim -> tiles. bfloat16 and float16.
HALF = {
    8: {
        "forward": {
            64: (Tiles(128, 64, 8, 3), Tiles(128, 32, 4, 3)),
            128: (Tiles(128, 32, 8, 3), Tiles(64, 64, 8, 3)),
            256: (Tiles(64, 32, 8, 2),),
        },
        "dk_dv": {64: (Tiles(64, 128, 8, 2), Tiles(64, 64, 4, 2)), 128: (Tiles(64, 64, 8, 2),), 256: (Tiles(32, 32, 8, 2),)},
        "dq": {64: (Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2)), 128: (Tiles(64, 64, 8, 2),), 256: (Tiles(64, 32, 8, 2),)},
    },
    9: {
        "forward": {
            64: (Tiles(128, 128, 8, 3, True), Tiles(128, 64, 4, 3, True)),
            128: (Tiles(128, 128, 8, 2, True), Tiles(128, 64, 8, 3, True)),
            256: (Tiles(128, 64, 8, 2, True),),
        },
        "dk_dv": {
            64: (Tiles(128, 128, 8, 2, True), Tiles(64, 128, 8, 3, True)),
            128: (Tiles(64, 128, 8, 2, True), Tiles(64, 128, 8, 2)),
            256: (Tiles(32, 32, 8, 2), Tiles(32, 64, 8, 2)),
        },
        "dq": {
            64: (Tiles(128, 128, 8, 2, True), Tiles(128, 64, 8, 3, True)),
            128: (Tiles(128, 64, 8, 2, True), Tiles(128, 128, 8, 2, True)),
            256: (Tiles(128, 32, 8, 2, True),),
        },
    },
    10: {
        "forward": {
            64: (Tiles(128, 128, 8, 3, True), Tiles(128, 64, 8, 3, True)),
            128: (Tiles(128, 64, 8, 3, True), Tiles(128, 128, 8, 2, True)),
            256: (Tiles(128, 64, 8, 2, True),),
        },
        "dk_dv": {64: (Tiles(64, 128, 8, 3, True),), 128: (Tiles(64, 128, 8, 2, True),), 256: (Tiles(32, 32, 8, 2),)},
        "dq": {64: (Tiles(128, 64, 8, 3, True),), 128: (Tiles(128, 64, 8, 2, True),), 256: (Tiles(128, 32, 8, 2, True),)},
    },
}
# float32 runs as three tf32 products and holds twice the bytes: small tiles.
FLOAT = {
    "forward": {128: (Tiles(32, 32, 4, 1),), 256: (Tiles(32, 16, 8, 1),)},
    "dk_dv": {128: (Tiles(32, 16, 4, 1),), 256: (Tiles(32, 16, 8, 1),)},
    "dq": {128: (Tiles(32, 16, 4, 1),), 256: (Tiles(32, 16, 8, 1),)},
}


def candidates(kernel: str, capability: tuple[int, int], dim: int, itemsize: int) -> tuple[Tiles, ...]:
    """Tiles for "forward", "dk_dv" or "dq", padded head dims up to `dim` and inputs of `itemsize` bytes."""
    by_dim = (FLOAT if itemsize > 2 else HALF[min(max(capability[0], 8), 10)])[kernel]
    return next(tiles for widest, tiles in by_dim.items() if dim <= widest)
