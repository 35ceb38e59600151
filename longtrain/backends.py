"""Which backend serves each op on this machine, and why the others do not. Built on each op's own refusal functions.

    print(*longtrain.backends.explain(), sep="\\n")                                       # typical calls
    print(*longtrain.backends.explain("attention", q=q, k=k, v=v, causal=True, softcap=30.0))   # this call
    print(*longtrain.backends.explain("attention", q=(1, 8192, 32, 128), k=(1, 131072, 8, 128), v=(1, 131072, 8, 128), causal=True,
                                      dtype=torch.bfloat16, device="cuda"))                    # a call of these shapes
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longtrain.ops.attention import explain as explain_attention
from longtrain.ops.linear_attention import explain as explain_linear_attention
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
    notes: tuple[str, ...] = ()
    """What else there is to say: a fall to plain torch, who differentiates the LSE."""

    def __str__(self) -> str:
        lines = [f"{self.op:<21} {self.case:<38} {self.backend}"]
        lines += [f"{'':<21}   {note}" for note in self.notes]
        lines += [f"{'':<21}   not {name}: {reason}" for name, reason in self.refusals.items()]
        return "\n".join(lines)


def explain(
    op: str | None = None, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32, **call: Any
) -> list[Served]:
    """Backends of one call of `op` (its arguments in `call`), or of typical calls of one op or of all.

    Tensors are only looked at; the shapes of attention's q, k, v will do, with `dtype` and `device`. `device` is also where typical
    calls have their tensors: the GPU if there is one. Raises ValueError for an unknown op, and what the op raises for a call that
    does not fit together.
    """
    if op is not None and op not in _EXPLAIN:
        raise ValueError(f"explain: op must be one of {', '.join(_EXPLAIN)}, not {op!r}")
    if call:
        if op is None:
            raise ValueError("explain: a call needs its op, as in explain('attention', q=q, k=k, v=v, causal=True)")
        return [_served(op, "this call", _of_shapes(call, dtype, device))]
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
        qkv = {x: torch.empty(1, 256, 2, 32, dtype=dtype, device=device) for x in "qkv"}
        yield "linear_attention", f"{name} with decay by feature", {**qkv, "decay": qkv["q"]}
        yield "linear_attention", f"{name} delta rule", {**qkv, "beta": qkv["q"][..., 0]}
        u, k = torch.empty(1, 256, 8, dtype=dtype, device=device), torch.empty(8, 256, device=device)
        yield "long_conv", f"{name} causal", dict(u=u, k=k)
        yield "long_conv", f"{name} two-sided", dict(u=u, k=k, causal=False)
        yield "long_conv", f"{name} filter of a head, gates, documents", dict(
            u=u, k=k[:2], gate_in=u, gate_out=u, cu_seqlens=torch.tensor([0, 100, 256], dtype=torch.int32))


def _of_shapes(call: dict[str, Any], dtype: torch.dtype, device: str | torch.device | None) -> dict[str, Any]:
    """The call with tensors for the shapes of q, k, v: fake ones, of any length and on devices that this machine does not have."""

    def empty(shape: tuple[int, ...]) -> torch.Tensor:
        with FakeTensorMode():
            return torch.empty(shape, dtype=dtype, device=device or "cpu")

    return {name: empty(x) if name in "qkv" and isinstance(x, (tuple, list, torch.Size)) else x for name, x in call.items()}


def _served(op: str, case: str, call: dict[str, Any]) -> Served:
    chosen, refusals, notes = _EXPLAIN[op](**call)
    return Served(op=op, case=case, backend=chosen, refusals=refusals, notes=notes)


def _attention(**call: Any) -> tuple[str, dict[str, str], tuple[str, ...]]:
    found = explain_attention(**call)
    notes = (found.fallback, f"gradient of the LSE: {found.lse_gradient}")
    return found.chosen, found.refusals, tuple(filter(None, notes))


def _by_reason(reasons: dict[str, str | None]) -> tuple[str, dict[str, str], tuple[str, ...]]:
    refusals = {name: why for name, why in reasons.items() if why is not None}
    return next(name for name in reasons if name not in refusals), refusals, ()


_EXPLAIN = {
    "attention": _attention,
    "linear_attention": lambda **call: _by_reason(explain_linear_attention(**call)),
    "linear_cross_entropy": lambda **call: _by_reason(explain_linear_cross_entropy(**call)),
    "long_conv": lambda **call: _by_reason(explain_long_conv(**call)),
}
