"""Which backend serves each op on this machine, and why the others do not. Built on each op's own refusal functions.

    print(*longtrain.backends.explain(), sep="\\n")                                       # typical calls
    print(*longtrain.backends.explain("attention", q=q, k=k, v=v, causal=True, softcap=30.0))   # this call
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from longtrain.ops.attention import explain as explain_attention
from longtrain.ops.linear_cross_entropy import explain as explain_linear_cross_entropy
from longtrain.ops.long_conv import explain as explain_long_conv


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One call of an op: who serves it and why the others do not."""

    op: str
    case: str
    backend: str
    refusals: dict[str, str]
    """Backend name -> why it cannot serve the call."""

    def __str__(self) -> str:
        lines = [f"{self.op:<21} {self.case:<38} {self.backend}"]
        lines += [f"{'':<21}   not {name}: {reason}" for name, reason in self.refusals.items()]
        return "\n".join(lines)


def explain(op: str | None = None, *, device: str | torch.device | None = None, **call: Any) -> list[Served]:
    """Backends of one call of `op` (its arguments in `call`; tensors are only looked at), or of typical calls of one op or of all.

    `device`: where typical calls have their tensors; the GPU if there is one. Raises ValueError for an unknown op, and what the op
    raises for a call that does not fit together.
    """
    if op is not None and op not in _EXPLAIN:
        raise ValueError(f"explain: op must be one of {', '.join(_EXPLAIN)}, not {op!r}")
    if call:
        if op is None:
            raise ValueError("explain: a call needs its op, as in explain('attention', q=q, k=k, v=v, causal=True)")
        return [_served(op, "this call", call)]
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return [_served(name, case, arguments) for name, case, arguments in typical_calls(device) if op in (None, name)]


def typical_calls(device: torch.device) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(op, what is special about it, its arguments), with uninitialised tensors of training-like shapes."""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        q = torch.empty(1, 64, 4, 64, dtype=dtype, device=device)
        kv = torch.empty(1, 256, 2, 64, dtype=dtype, device=device)
        chunk = dict(q=q, k=kv, v=kv, causal=True)
        yield "attention", f"{name} chunk of a causal sequence", chunk
        yield "attention", f"{name} window", {**chunk, "window_size": (63, 0)}
        yield "attention", f"{name} dropout", {**chunk, "dropout_p": 0.1, "dropout_seed": 0}
        yield "attention", f"{name} sinks and softcap", {**chunk, "sink_tokens": 4, "softcap": 30.0}
        documents = dict(cu_seqlens_q=torch.tensor([0, 64], dtype=torch.int32), cu_seqlens_k=torch.tensor([0, 256], dtype=torch.int32))
        yield "attention", f"{name} documents", {**chunk, **documents}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        head = dict(input=torch.empty(64, 32, dtype=dtype, device=device), weight=torch.empty(128, 32, dtype=dtype, device=device),
                    target=torch.empty(64, dtype=torch.int64, device=device))
        yield "linear_cross_entropy", name, head
        yield "linear_cross_entropy", f"{name} softcap and z-loss", {**head, "softcap": 30.0, "z_loss": 1e-4}
        u, k = torch.empty(1, 256, 8, dtype=dtype, device=device), torch.empty(8, 256, device=device)
        yield "long_conv", f"{name} causal", dict(u=u, k=k)
        yield "long_conv", f"{name} two-sided", dict(u=u, k=k, causal=False)


def _served(op: str, case: str, call: dict[str, Any]) -> Served:
    chosen, refusals = _EXPLAIN[op](**call)
    return Served(op=op, case=case, backend=chosen, refusals=refusals)


def _attention(**call: Any) -> tuple[str, dict[str, str]]:
    found = explain_attention(**call)
    return found.chosen, found.refusals


def _by_reason(reasons: dict[str, str | None]) -> tuple[str, dict[str, str]]:
    return next(name for name, why in reasons.items() if why is None), {name: why for name, why in reasons.items() if why is not None}


_EXPLAIN = {
    "attention": _attention,
    "linear_cross_entropy": lambda **call: _by_reason(explain_linear_cross_entropy(**call)),
    "long_conv": lambda **call: _by_reason(explain_long_conv(**call)),
}
