"""What a long-convolution call is, checked, and how its filter's taps lie on lags. Axes: T tokens, E channels, W taps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call, as the backends and their `refuse` functions see it."""

    u_BTE: Tensor
    k_EW: Tensor
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
        for tensor in (self.u_BTE, self.k_EW, self.skip_E, self.gate_in_BTE, self.gate_out_BTE):
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
        return dtype

    @property
    def documents(self) -> list[slice]:
        """Token ranges of the documents that have tokens."""
        return [slice(start, stop) for start, stop in zip(self.edges, self.edges[1:]) if stop > start]


def reach(taps: int, length: int, causal: bool) -> tuple[int, int]:
    """(p, q): of a filter with W taps, `k[:, :p]` meets tokens of a document of `length` at lags 0 .. p-1 (the past),
    `k[:, W-q:]` at lags -q .. -1 (the future)."""
    if causal:
        return min(taps, length), 0
    return min((taps + 1) // 2, length), min(taps // 2, length - 1)


def checked(u, k, skip, gate_in, gate_out, causal, cu_seqlens) -> Call:
    """The call as data; ValueError for what does not fit. Reads `cu_seqlens` (a device synchronisation if it is on a GPU)."""
    if u.dim() != 3 or k.dim() != 2 or k.shape[0] != u.shape[2] or k.shape[1] < 1:
        raise ValueError(f"long_conv: u [B, T, E] and k [E, W] (W at least 1) do not fit: {list(u.shape)} and {list(k.shape)}")
    if skip is not None and skip.shape != k.shape[:1]:
        raise ValueError(f"long_conv: skip must have shape [E] = {list(k.shape[:1])}, not {list(skip.shape)}")
    for name, gate in (("gate_in", gate_in), ("gate_out", gate_out)):
        if gate is not None and gate.shape != u.shape:
            raise ValueError(f"long_conv: {name} must have u's shape {list(u.shape)}, not {list(gate.shape)}")
    for name, tensor in (("u", u), ("k", k), ("skip", skip), ("gate_in", gate_in), ("gate_out", gate_out)):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(f"long_conv: {name} must be real floating point, not {tensor.dtype}")
    edges = (0, u.shape[1])
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"long_conv: cu_seqlens must be a 1-d int32 or int64 tensor, not {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
        edges = tuple(cu_seqlens.tolist())
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != u.shape[1] or any(a > b for a, b in zip(edges, edges[1:])):
            raise ValueError(f"long_conv: cu_seqlens must ascend from 0 to T = {u.shape[1]}, not {_shortened(edges)}")
    return Call(u_BTE=u, k_EW=k, skip_E=skip, gate_in_BTE=gate_in, gate_out_BTE=gate_out, causal=causal, edges=edges)


def _shortened(edges: tuple[int, ...]) -> str:
    return str(list(edges)) if len(edges) <= 8 else f"[{', '.join(map(str, edges[:4]))}, ..., {edges[-1]}]"
