"""What a linear-attention call is, checked. Axes: B batch, T tokens, H heads, D key features, Dv value features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call, as the backends see it."""

    q_BTHD: Tensor
    k_BTHD: Tensor
    v_BTHV: Tensor
    decay_BTHG: Tensor | None
    """Log decays; G is 1 (a head forgets all its features alike) or D."""
    beta_BTH: Tensor | None
    state_BHDV: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    chunk_size: int

    @property
    def wide(self) -> torch.dtype:
        """The dtype of all arithmetic and of the state: float32, or float64 where an input is."""
        dtype = torch.float32
        for tensor in (self.q_BTHD, self.k_BTHD, self.v_BTHV, self.decay_BTHG, self.beta_BTH, self.state_BHDV):
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
        return dtype

    def check_documents(self) -> None:
        """ValueError for boundaries that are none. Reads them (a device synchronisation if they are on a GPU)."""
        if self.cu_seqlens is None:
            return
        edges, T = self.cu_seqlens.tolist(), self.q_BTHD.shape[1]
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != T or any(a > b for a, b in zip(edges, edges[1:], strict=False)):
            shown = str(edges) if len(edges) <= 8 else f"[{', '.join(map(str, edges[:4]))}, ..., {edges[-1]}]"
            raise ValueError(f"linear_attention: cu_seqlens must ascend from 0 to T = {T}, not {shown}")

    def marked_decay(self) -> Tensor | None:
        """`decay_BTHG`, wide, with minus infinity at the first token of every document but the first: it forgets what came before."""
        g_BTHG = None if self.decay_BTHG is None else self.decay_BTHG.to(self.wide)
        if self.cu_seqlens is None or len(self.cu_seqlens) <= 2:
            return g_BTHG
        B, T, H = self.q_BTHD.shape[:3]
        # One token more than there are: documents that begin behind the last one are empty.
        marked_BTHG = self.q_BTHD.new_zeros(B, T + 1, H, 1 if g_BTHG is None else g_BTHG.shape[3], dtype=self.wide)
        if g_BTHG is not None:
            marked_BTHG[:, :T] = g_BTHG
        starts = self.cu_seqlens[1:-1].to(self.q_BTHD.device, torch.int64)
        return marked_BTHG.index_fill_(1, starts, float("-inf"))[:, :T]


def checked(q, k, v, decay, beta, scale, initial_state, cu_seqlens, chunk_size) -> Call:
    """The call as data; ValueError for what does not fit and can be told without reading tensor values."""
    for name, tensor in (("q", q), ("k", k), ("v", v), ("beta", beta), ("initial_state", initial_state)):
        if tensor is None and name in ("beta", "initial_state"):
            continue
        if not (isinstance(tensor, Tensor) and tensor.dtype.is_floating_point):
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"linear_attention: {name} must be a real floating-point tensor, not {found}")
        _check_device(name, tensor, q)
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"linear_attention: q, k [B, T, H, D] and v [B, T, H, Dv] do not fit: {list(q.shape)}, {list(k.shape)} and {list(v.shape)}; "
            "repeat keys and values where queries have more heads"
        )
    B, T, H, D = q.shape
    if D < 1:
        raise ValueError(f"linear_attention: q and k need at least one feature, found {list(q.shape)}")
    if beta is not None and beta.shape != (B, T, H):
        raise ValueError(f"linear_attention: beta must have shape [B, T, H] = {[B, T, H]}, not {list(beta.shape)}")
    if initial_state is not None and initial_state.shape != (B, H, D, v.shape[3]):
        raise ValueError(
            f"linear_attention: initial_state must have shape [B, H, D, Dv] = {[B, H, D, v.shape[3]]}, not {list(initial_state.shape)}"
        )
    if not isinstance(chunk_size, int) or chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"linear_attention: chunk_size must be a power of two, not {chunk_size!r}; 64 serves most calls")
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            found = f"{list(cu_seqlens.shape)} {cu_seqlens.dtype}" if isinstance(cu_seqlens, Tensor) else repr(cu_seqlens)
            raise ValueError(f"linear_attention: cu_seqlens must be a 1-d int32 or int64 tensor, not {found}")
    scale = D**-0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"linear_attention: scale must be finite, found {scale}")
    return Call(
        q_BTHD=q, k_BTHD=k, v_BTHV=v, decay_BTHG=_decay(decay, q), beta_BTH=beta, state_BHDV=initial_state, cu_seqlens=cu_seqlens,
        scale=scale, chunk_size=chunk_size,
    )  # fmt: skip


def _decay(decay, q: Tensor) -> Tensor | None:
    """Log decays as [B, T, H, 1 or D]: of a number, one a head, one a token and head, or one a key feature as well."""
    if decay is None:
        return None
    B, T, H, D = q.shape
    if isinstance(decay, Tensor):
        _check_device("decay", decay, q)
    else:
        if not isinstance(decay, (int, float)):
            raise ValueError(f"linear_attention: decay must be a number or a tensor, not {type(decay).__name__}")
        if not decay <= 0:
            raise ValueError(f"linear_attention: decay is a logarithm and at most 0, found {decay!r}; math.log(0.99) forgets 1% a token")
        decay = torch.full((), decay, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if not decay.dtype.is_floating_point or decay.shape not in ((), (H,), (B, T, H), (B, T, H, D)):
        raise ValueError(
            f"linear_attention: decay must be a number, or floating point of shape [H], [B, T, H] or [B, T, H, D] = {[B, T, H, D]}, "
            f"not {decay.dtype} {list(decay.shape)}"
        )
    return decay if decay.dim() == 4 else decay.expand(B, T, H)[..., None]


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"linear_attention: {name} is on {tensor.device} and q on {q.device}; move it there")
