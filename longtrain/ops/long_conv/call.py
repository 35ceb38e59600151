"""What a long-convolution call is, checked, and how its filter's taps lie on lags. Axes: T tokens, E channels, H filters, W taps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call, as the backends see it."""

    u_BTE: Tensor
    k_HW: Tensor
    """Row h serves the channels of head h: `share` consecutive ones."""
    skip_E: Tensor | None
    gate_in_BTE: Tensor | None
    gate_out_BTE: Tensor | None
    causal: bool
    edges: tuple[int, ...]
    """Document boundaries along T, 0 first and T last."""

    @property
    def wide(self) -> torch.dtype:
        """The dtype of all arithmetic: float32, or float64 where an input is."""
        dtype = torch.float32
        for tensor in (self.u_BTE, self.k_HW, self.skip_E, self.gate_in_BTE, self.gate_out_BTE):
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
        return dtype

    @property
    def share(self) -> int:
        """Consecutive channels that have the same filter."""
        return self.u_BTE.shape[2] // max(1, self.k_HW.shape[0])

    @property
    def documents(self) -> list[slice]:
        """Token ranges of the documents that have tokens."""
        return [slice(start, stop) for start, stop in zip(self.edges, self.edges[1:]) if stop > start]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which gradients a backward is asked for."""

    u: bool
    k: bool
    skip: bool
    gate_in: bool
    gate_out: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """What a backward gives out: None where not wanted. Those of k and skip are wide."""

    du_BTE: Tensor | None = None
    dk_HW: Tensor | None = None
    dskip_E: Tensor | None = None
    dgate_in_BTE: Tensor | None = None
    dgate_out_BTE: Tensor | None = None


def reach(taps: int, length: int, causal: bool) -> tuple[int, int]:
    """(p, q): of a filter with W taps, `k[:, :p]` meets tokens of a document of `length` at lags 0 .. p-1 (the past),
    `k[:, W-q:]` at lags -q .. -1 (the future)."""
    if causal:
        return min(taps, length), 0
    return min((taps + 1) // 2, length), min(taps // 2, length - 1)


def wrong(argument: str, found, expected: str) -> ValueError:
    return ValueError(f"long_conv: {argument}: found {found}, expected {expected}")


def check_tensors(u, k, skip, gate_in, gate_out, causal, cu_seqlens) -> None:
    """Everything that can be told without reading tensor values; ValueError naming argument, found and expected."""
    for name, x in (("u", u), ("k", k), ("skip", skip), ("gate_in", gate_in), ("gate_out", gate_out)):
        if x is None and name not in ("u", "k"):
            continue
        if not isinstance(x, Tensor):
            raise wrong(name, type(x).__name__, "a tensor")
        if x.dtype not in DTYPES:
            raise wrong(name, x.dtype, "float64, float32, bfloat16 or float16")
        if x.device != u.device:
            raise wrong(name, x.device, f"u's device {u.device}")
    if u.dim() != 3:
        raise wrong("u", f"shape {tuple(u.shape)}", "3 axes [batch, tokens, channels]")
    E = u.shape[2]
    if k.dim() != 2 or k.shape[1] < 1:
        raise wrong("k", f"shape {tuple(k.shape)}", "2 axes [filters, taps] and at least one tap")
    if k.shape[0] != E and (k.shape[0] == 0 or E % k.shape[0]):
        raise wrong("k", f"{k.shape[0]} filters", f"one for each of u's {E} channels, or a divisor of them (one for each head)")
    if skip is not None and tuple(skip.shape) != (E,):
        raise wrong("skip", f"shape {tuple(skip.shape)}", f"shape ({E},)")
    for name, gate in (("gate_in", gate_in), ("gate_out", gate_out)):
        if gate is not None and gate.shape != u.shape:
            raise wrong(name, f"shape {tuple(gate.shape)}", f"u's shape {tuple(u.shape)}")
    if not isinstance(causal, bool):
        raise wrong("causal", repr(causal), "True or False")
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        found = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else repr(cu_seqlens)
        raise wrong("cu_seqlens", found, "an int32 or int64 tensor [documents + 1]")
    if cu_seqlens.shape[0] < 2:
        raise wrong("cu_seqlens", f"{cu_seqlens.shape[0]} entries", "documents + 1 of them, at least 2")


def check_like(name: str, x, shape: torch.Size, dtype: torch.dtype, u: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise wrong(name, type(x).__name__, "a tensor")
    if x.shape != shape:
        raise wrong(name, f"shape {tuple(x.shape)}", f"shape {tuple(shape)}")
    if x.dtype != dtype:
        raise wrong(name, x.dtype, f"{dtype}")
    if x.device != u.device:
        raise wrong(name, x.device, f"u's device {u.device}")


def build_call(u, k, skip, gate_in, gate_out, causal, cu_seqlens) -> Call:
    """The call as data. Reads `cu_seqlens` (a device synchronisation if it is on a GPU: keep it on the CPU).

    Raises:
        ValueError: for boundaries that decrease or do not cover the tokens.
    """
    edges = (0, u.shape[1])
    if cu_seqlens is not None:
        edges = tuple(cu_seqlens.tolist())
        if edges[0] != 0:
            raise wrong("cu_seqlens", f"first entry {edges[0]}", "0")
        for i, (before, after) in enumerate(zip(edges, edges[1:])):
            if after < before:
                raise wrong("cu_seqlens", f"{after} after {before} at entry {i + 1}", "entries that never decrease")
        if edges[-1] != u.shape[1]:
            raise wrong("cu_seqlens", f"last entry {edges[-1]}", f"the number of tokens, {u.shape[1]}")
    return Call(u_BTE=u, k_HW=k, skip_E=skip, gate_in_BTE=gate_in, gate_out_BTE=gate_out, causal=causal, edges=edges)
