"""Where the bytes of an extent live. A leaf: data only, everything may import it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A tier, and whether the bytes are exact there."""

    tier: Literal["device", "host", "disk"] = "device"
    """`device`: where the model computes. `host`: memory beside it (pinned where the device is a GPU). `disk`: a file."""

    compress: bool = False
    """FP8 with a scale for every 128 values (`longtrain.offload.fp8`): a quarter of float32's bytes, and lossy."""


DEVICE = Place()


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSettings:
    """The disk tier: one file of a fixed size, made for this process and gone with it."""

    path: str
    """A directory on a real disk (not tmpfs) with `budget` bytes free."""

    budget: int
    """Bytes of the file, taken when the store is made."""

    max_written: int | None = None
    """Bytes that may be written to the disk in the store's life, for disks wear; None for no limit."""
