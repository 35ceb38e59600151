"""Amounts of memory and time, read and written. A leaf: everything may import it."""

from __future__ import annotations

import math
import re

GIB = 2**30
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str | int, setting: str = "budget") -> int:
    """`1.5GiB`, `72 GB`, `800MiB`, or a number of bytes. Raises ValueError naming `setting`."""
    given = text
    if not isinstance(text, str):
        text = f"{text}B"
    number = text.strip().rstrip("BKMGTIbkmgti").strip()
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise ValueError(f"{setting}: {given!r} is not an amount of memory; write one such as 1.5GiB or 800MiB") from None
    if not math.isfinite(size) or size < 1:
        raise ValueError(f"{setting}: {given!r} is no memory at all; write an amount such as 1.5GiB")
    return int(size)


def format_bytes(size: float) -> str:
    """1.50 GiB, 812 MiB, 12 KiB."""
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    unit, of = next(((unit, of) for unit, of in (("MiB", 2**20), ("KiB", 2**10)) if size >= of), ("B", 1))
    return f"{size / of:.0f} {unit}"


def format_time(seconds: float) -> str:
    """4m12s, 3h05m."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 60}m{whole % 60:02}s"


def parse_time(text: str) -> float:
    """Seconds of `11h50m`, `90s`, `2d`, `1h30m20s`. Raises ValueError."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    seconds = sum(int(n or 0) * unit for n, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True)) if match else 0
    if seconds < 1:
        raise ValueError(f"{text!r} is not a time; write one such as 11h50m, 90s or 2d")
    return float(seconds)
