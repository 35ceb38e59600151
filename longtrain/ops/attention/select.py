"""Which backend serves a call, and why the others do not.

The order is preference. "auto" takes the first backend that does not refuse; a backend asked for by name either serves
the call or raises with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from longtrain.ops.attention import cpp, flash, reference, sdpa, tiled
from longtrain.ops.attention.call import AttentionCall, wrong

BACKENDS: dict[str, ModuleType] = {"cpp": cpp, "flash": flash, "sdpa": sdpa, "tiled": tiled, "reference": reference}


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What `explain` found out about one call."""

    chosen: str
    """The backend that serves the call."""
    refusals: dict[str, str]
    """Backend name -> why it cannot serve the call."""

    def __str__(self) -> str:
        lines = [f"attention: {self.chosen}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refusals.items()]
        return "\n".join(lines)


def explain_call(call: AttentionCall, backend: str = "auto") -> Explanation:
    """The choice and every refusal for a built call.

    Raises:
        ValueError: a backend asked for by name that is unknown or refuses.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise wrong("backend", repr(backend), f"'auto' or one of {', '.join(map(repr, BACKENDS))}")
    refusals = {}
    for name, module in BACKENDS.items():
        reason = module.refuse(call)
        if reason is not None:
            refusals[name] = reason
    if backend != "auto":
        if backend in refusals:
            raise wrong("backend", repr(backend), f"another one, or 'auto': it refuses this call ({refusals[backend]})")
        return Explanation(chosen=backend, refusals=refusals)
    return Explanation(chosen=next(name for name in BACKENDS if name not in refusals), refusals=refusals)


def select(call: AttentionCall, backend: str) -> ModuleType:
    """The backend module that serves the call; ValueError as in `explain_call`."""
    if backend == "auto":
        return next(module for module in BACKENDS.values() if module.refuse(call) is None)
    return BACKENDS[explain_call(call, backend).chosen]
