"""Ranges of numbers: a setting outside raises ValueError that begins with its name and ends with the remedy."""

from __future__ import annotations


def at_least(setting: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{setting}: must be at least {least}, found {value}; raise it")


def above_zero(setting: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{setting}: must be above 0, found {value:g}; give a positive number")


def between(setting: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{setting}: must be from {low:g} to {high:g}, found {value:g}; choose a value in that range")
