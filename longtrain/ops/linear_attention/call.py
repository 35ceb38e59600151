"""What a linear-attention call is, checked. Axes: B batch, T tokens, H heads, D key features, Dv value features."""

from __future__ import annotations

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
    """The call as data; ValueError for what does not fit. Reads `cu_seqlens` (a device synchronisation if it is on a GPU)."""
    for name, tensor in (("q", q), ("k", k), ("v", v), ("beta", beta), ("initial_state", initial_state)):
        if tensor is not None and not (isinstance(tensor, Tensor) and tensor.dtype.is_floating_point):
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"linear_attention: {name} must be a real floating-point tensor, not {found}")
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"linear_attention: q, k [B, T, H, D] and v [B, T, H, Dv] do not fit: {list(q.shape)}, {list(k.shape)} and {list(v.shape)}; "
            "repeat keys and values where queries have more heads"
        )
    B, T, H, D = q.shape
    if beta is not None and beta.shape != (B, T, H):
        raise ValueError(f"linear_attention: beta must have shape [B, T, H] = {[B, T, H]}, not {list(beta.shape)}")
    if initial_state is not None and initial_state.shape != (B, H, D, v.shape[3]):
        raise ValueError(
            f"linear_attention: initial_state must have shape [B, H, D, Dv] = {[B, H, D, v.shape[3]]}, not {list(initial_state.shape)}"
        )
    if not isinstance(chunk_size, int) or chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"linear_attention: chunk_size must be a power of two, not {chunk_size!r}; 64 serves most calls")
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"linear_attention: cu_seqlens must be a 1-d int32 or int64 tensor, not {list(cu_seqlens.shape)} {cu_seqlens.dtype}"
            )
        edges = cu_seqlens.tolist()
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != T or any(a > b for a, b in zip(edges, edges[1:], strict=False)):
            shown = str(edges) if len(edges) <= 8 else f"[{', '.join(map(str, edges[:4]))}, ..., {edges[-1]}]"
            raise ValueError(f"linear_attention: cu_seqlens must ascend from 0 to T = {T}, not {shown}")
    scale = D**-0.5 if scale is None else float(scale)
    return Call(
        q_BTHD=q, k_BTHD=k, v_BTHV=v, decay_BTHG=_decay(decay, q), beta_BTH=beta, state_BHDV=initial_state, cu_seqlens=cu_seqlens,
        scale=scale, chunk_size=chunk_size,
    )  # fmt: skip


def _decay(decay, q: Tensor) -> Tensor | None:
    """Log decays as [B, T, H, 1 or D]: of a number, one a head, one a token and head, or one a key feature as well."""
    if decay is None:
        return None
    B, T, H, D = q.shape
    if not isinstance(decay, Tensor):
        if not decay <= 0:
            raise ValueError(f"linear_attention: decay is a logarithm and at most 0, found {decay!r}; math.log(0.99) forgets 1% a token")
        decay = torch.full((), decay, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if not decay.dtype.is_floating_point or decay.shape not in ((), (H,), (B, T, H), (B, T, H, D)):
        raise ValueError(
            f"linear_attention: decay must be a number, or floating point of shape [H], [B, T, H] or [B, T, H, D] = {[B, T, H, D]}, "
            f"not {decay.dtype} {list(decay.shape)}"
        )
    return decay if decay.dim() == 4 else decay.expand(B, T, H)[..., None]
