"""Which backend serves a call, and why the others do not.

The order is preference. "auto" takes the first backend that does not refuse; a backend asked for by name either serves
the call or raises with its reason. On a GPU plain torch is no kernel but a fall by a factor of ten and more: what then
happens is `kernel_fallback`. Float64 is exempt, since only proofs use it and no kernel has it; so is a CPU without the
extension, where torch is the documented path (`longtrain train` has a setting for it).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch

from longtrain.ops.attention import cpp, cudnn, flash, flash_attn, reference, sdpa, tiled, triton
from longtrain.ops.attention.call import AttentionCall, wrong

BACKENDS: dict[str, Any] = {
    "cpp": cpp,
    "flash_attn_4": flash_attn.BACKENDS["flash_attn_4"],
    "flash_attn_3": flash_attn.BACKENDS["flash_attn_3"],
    "cudnn": cudnn,
    "flash": flash,
    "flash_attn_2": flash_attn.BACKENDS["flash_attn_2"],
    "triton": triton,
    "sdpa": sdpa,
    "tiled": tiled,
    "reference": reference,
}
"""Modules, or objects, with `refuse(call)`, `forward(call, ...)` and `backward(call, ...)`."""

NEVER = {
    "flex": "FlexAttention differentiates only its own forward: no public backward takes a global out and lse, and what lies under it "
            "is compiled anew for every mask and wants a table of blocks that grows with the square of the length",
}
"""Libraries that can serve no call exactly, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What `explain` found out about one call."""

    chosen: str
    """The backend that serves the call."""
    refusals: dict[str, str]
    """Backend name -> why it cannot serve the call."""
    lse_gradient: str = ""
    """Which backend differentiates the LSE, where a loss uses it, and why not the chosen one."""
    fallback: str | None = None
    """What `kernel_fallback` is about: the call falls to plain torch on a GPU. None: it does not."""

    def __str__(self) -> str:
        lines = [f"attention: {self.chosen}"]
        lines += [f"  {self.fallback}"] if self.fallback else []
        lines += [f"  not {name}: {reason}" for name, reason in self.refusals.items()]
        return "\n".join([*lines, f"  gradient of the LSE: {self.lse_gradient}"])


def explain_call(call: AttentionCall, backend: str = "auto", kernel_fallback: str = "error") -> Explanation:
    """The choice and every refusal for a built call.

    Raises:
        ValueError: a backend asked for by name that is unknown or refuses.
    """
    _check(call, backend, kernel_fallback)
    reasons = {name: module.refuse(call) for name, module in BACKENDS.items()}
    refusals = {name: reason for name, reason in reasons.items() if reason is not None} | NEVER
    if backend in refusals:
        raise wrong("backend", repr(backend), f"another one, or 'auto': it refuses this call ({refusals[backend]})")
    chosen = next(name for name in BACKENDS if name not in refusals) if backend == "auto" else backend
    with_lse = replace(call, has_dlse=True)
    reason = BACKENDS[chosen].refuse(with_lse)
    by = chosen if reason is None else next(name for name, module in BACKENDS.items() if module.refuse(with_lse) is None)
    return Explanation(
        chosen=chosen, refusals=refusals, fallback=fall(call, chosen) if backend == "auto" else None,
        lse_gradient=by if reason is None else f"not by {chosen} ({reason})" + (f"; {by} serves it" if backend == "auto" else ""),
    )


def fall(call: AttentionCall, chosen: str) -> str | None:
    """What to say of a call that falls from GPU kernels to plain torch, or None if it does not."""
    if call.device.type != "cuda" or chosen not in ("tiled", "reference") or call.dtype == torch.float64:
        return None
    return "no GPU kernel serves this call; plain torch does, more than ten times slower"


def select(call: AttentionCall, backend: str, kernel_fallback: str = "error") -> Any:
    """The backend that serves the call; ValueError as in `explain_call`, and where `kernel_fallback` is "error" for a GPU's fall."""
    if backend != "auto":
        return BACKENDS[explain_call(call, backend, kernel_fallback).chosen]
    _check(call, backend, kernel_fallback)
    chosen = next(name for name, module in BACKENDS.items() if module.refuse(call) is None)
    said = fall(call, chosen)
    if said is not None:
        said = f"attention: {said} (backends.explain tells every reason)"
        if kernel_fallback == "error":
            raise ValueError(f"{said}. Change the call, or allow it with kernel_fallback='warn' or backend='tiled'")
        warnings.warn(said, stacklevel=2)
    return BACKENDS[chosen]


def _check(call: AttentionCall, backend: str, kernel_fallback: str) -> None:
    if backend not in ("auto", *BACKENDS, *NEVER):
        raise wrong("backend", repr(backend), f"'auto' or one of {', '.join(map(repr, BACKENDS))}")
    if call.partials not in ("bf16", "fp32"):
        raise wrong("partials", repr(call.partials), "'bf16' or 'fp32'")
    if kernel_fallback not in ("error", "warn"):
        raise wrong("kernel_fallback", repr(kernel_fallback), "'error' or 'warn'")
