"""Linear attention as it is defined, token by token. Plain torch, any dtype: the oracle of the other backends.

    S_t = diag(a_t) S_{t-1} + k_t u_t^T        out_t = scale S_t^T q_t        S [D, Dv], a_t = exp(decay_t)

    u_t = v_t                                        without beta
    u_t = beta_t (v_t - (diag(a_t) S_{t-1})^T k_t)   with beta: the delta rule, which overwrites what k_t pointed to

Without decay and beta this is linear attention (Katharopoulos et al. 2020, arXiv:2006.16236), with a decay a head RetNet
(arXiv:2307.08621) and Mamba-2 (arXiv:2405.21060), with one a feature GLA (arXiv:2312.06635, eq. 3); with beta DeltaNet
(arXiv:2406.06484, eq. 1), with both gated DeltaNet (arXiv:2412.06464, eq. 10). A document's first token finds S = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtrain.ops.linear_attention.call import Call


def refuse(call: Call) -> str | None:
    """The reference serves every call."""
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Output ``[B, T, H, Dv]`` in q's dtype and the last state ``[B, H, D, Dv]``, wide. Autograd differentiates it, any number of times."""
    wide = call.wide
    q_BTHD, k_BTHD, v_BTHV = (t.to(wide) for t in (call.q_BTHD, call.k_BTHD, call.v_BTHV))
    B, T, H, D = q_BTHD.shape
    state_BHDV = q_BTHD.new_zeros(B, H, D, v_BTHV.shape[3]) if call.state_BHDV is None else call.state_BHDV.to(wide)
    starts = set() if call.cu_seqlens is None else set(call.cu_seqlens[1:-1].tolist())
    outs = [v_BTHV[:, :0]]
    for t in range(T):
        if t in starts:
            state_BHDV = state_BHDV * 0
        if call.decay_BTHG is not None:
            state_BHDV = state_BHDV * call.decay_BTHG[:, t].to(wide).exp()[..., None]
        u_BHV = v_BTHV[:, t]
        if call.beta_BTH is not None:
            held_BHV = torch.einsum("bhdv,bhd->bhv", state_BHDV, k_BTHD[:, t])
            u_BHV = call.beta_BTH[:, t].to(wide)[..., None] * (u_BHV - held_BHV)
        state_BHDV = state_BHDV + k_BTHD[:, t, :, :, None] * u_BHV[:, :, None]
        outs.append(call.scale * torch.einsum("bhdv,bhd->bhv", state_BHDV, q_BTHD[:, t])[:, None])
    return torch.cat(outs, dim=1).to(call.q_BTHD.dtype), state_BHDV
