"""Checksum of a block of an extent: catches a flipped byte, a lost write and bytes of another place."""

from __future__ import annotations

import numpy as np

_EXTENT, _OFFSET = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F


def checksum(data: np.ndarray, extent: int, offset: int) -> int:
    """Sum modulo 2^64 of the int64 words of `data` (uint8), and of a shorter last one, with the extent's number and the offset in its
    tier."""
    whole = data.nbytes // 8 * 8
    words = int(np.add.reduce(data[:whole].view(np.int64))) + int.from_bytes(data[whole:].tobytes(), "little")
    return (words + extent * _EXTENT + offset * _OFFSET) % 2**64


def check(data: np.ndarray, extent: int, offset: int, expected: int | None) -> None:
    """Raises ChecksumError where the bytes are not those that were written."""
    if (found := checksum(data, extent, offset)) != expected:
        raise ChecksumError(f"checksum {found:016x} where {'none' if expected is None else f'{expected:016x}'} was written")


class ChecksumError(Exception):
    """Bytes of a tier are not what was written there."""
