"""Linear attention by chunks: inside a chunk matrix products, between chunks the state. Forward and backward by hand, any device.

With S the state at a chunk's entry, A_i and Z_j the decays from the entry to token i and behind token j to the end, P the decayed scores of
queries and keys (`decay.py`) and M those of keys and earlier keys:

    U = V                                                   without beta
    (I + diag(beta) M) U = diag(beta) (V - (K A) S)         with beta: "UT transform" (DeltaNet, arXiv:2406.06484, section 3;
                                                            gated DeltaNet, arXiv:2412.06464, section 3.3)
    out = (Q A) S + P U          S' = diag(A_c) S + (K Z)^T U

(GLA, arXiv:2312.06635, section 4; Mamba-2, arXiv:2405.21060, section 6.) The backward pass takes the chunks in reverse order with the
adjoint of the state; dX is the adjoint of the right-hand side of the system above, X:

    dU = P^T dout + (K Z) dS'        dX = (I + diag(beta) M)^-T dU        dV = diag(beta) dX        d(diag(beta) M) = -dX U^T
    dS = (Q A)^T dout + diag(A_c) dS' - (K A)^T dV

Only the entry states of pieces of many chunks are kept from forward to backward; those of a piece's chunks are made again, so that the
workspace is that of one piece. Axes: B batch, H heads, n chunk, c its tokens, D key features, V value features, G = 1 or D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longtrain.ops.linear_attention import decay
from longtrain.ops.linear_attention.call import Call

PIECE_TOKENS = {"cpu": 1024, "other": 8192}


def refuse(call: Call) -> str | None:
    """Plain torch serves every call."""
    return None


def footprint_bytes(
    tokens: int, heads: int, key_dim: int, value_dim: int, *, decays: int, delta: bool, chunk_size: int, itemsize: int, device: str,
) -> int:  # fmt: skip
    """Workspace of the backward pass, as `longtrain.ops.linear_attention.footprint_bytes`.

    Counted: tensors of a piece as wide as the widest of D, Dv and c, 16 of them, 4 more with a decay, 10 with one a feature, 16 with the
    delta rule.
    """
    piece = min(tokens, _piece_tokens(device, chunk_size))
    tensors = 16 + (0 if not decays else 4 if decays == 1 else 10) + 16 * delta
    return tensors * piece * heads * max(key_dim, value_dim, min(chunk_size, tokens)) * itemsize


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[B, T, H, Dv]`` in q's dtype, the last state ``[B, H, D, Dv]``, the entry states ``[B, pieces, H, D, Dv]``, both wide."""
    (B, _, H, D), V = call.q_BTHD.shape, call.v_BTHV.shape[3]
    out_BTHV = call.v_BTHV.new_empty(call.v_BTHV.shape, dtype=call.q_BTHD.dtype)
    pieces, marked = pieces_of(call), call.marked_decay()
    entries_BPHDV = call.v_BTHV.new_zeros(B, len(pieces), H, D, V, dtype=call.wide)
    state_BHDV = entries_BPHDV.new_zeros(B, H, D, V) if call.state_BHDV is None else call.state_BHDV.to(call.wide, copy=True)
    for p, tokens in enumerate(pieces):
        entries_BPHDV[:, p] = state_BHDV
        piece = _Piece.make(call, marked, tokens)
        states, U, state_BHDV = piece.pass_on(state_BHDV)
        _put(out_BTHV, tokens, (piece.Q_to @ states).add_(piece.scores[0] @ U))
    return out_BTHV, state_BHDV, entries_BPHDV


def backward(call: Call, entries_BPHDV: Tensor, dout_BTHV: Tensor, dstate_BHDV: Tensor | None) -> list[Tensor | None]:
    """Gradients of q, k, v, decay and beta, in their dtypes, None for what was not given, and that of the initial state, always.
    `dstate`: gradient of the last state."""
    inputs = (call.q_BTHD, call.k_BTHD, call.v_BTHV, call.decay_BTHG, call.beta_BTH)
    grads = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs]
    dq, dk, dv, dg, dbeta = grads
    wide, marked = call.wide, call.marked_decay()
    state_shape = (entries_BPHDV.shape[0], *entries_BPHDV.shape[2:])
    dS = entries_BPHDV.new_zeros(state_shape) if dstate_BHDV is None else dstate_BHDV.to(wide, copy=True)
    for p, tokens in reversed(list(enumerate(pieces_of(call)))):
        piece = _Piece.make(call, marked, tokens)
        states, U, _ = piece.pass_on(entries_BPHDV[:, p])
        dO = _chunked(dout_BTHV[:, tokens], piece.chunk, wide)
        dU, dexits, dS = piece.pass_back(dO, dS)
        dQ_to, dP = dO @ states.mT, (dO @ U.mT).tril_()
        dK_behind = U @ dexits.mT
        dthrough = (states * dexits).sum(-1)[..., None, :]
        if piece.beta is None:
            dV, drows_through, dK_to = dU, dP[None], None
        else:
            dX = torch.linalg.solve_triangular(piece.system.mT, dU, upper=True, unitriangular=True)
            left = piece.V - piece.K_to @ states - piece.scores[1] @ U  # U over beta
            _put(dbeta[..., None], tokens, (dX * left).sum(-1, keepdim=True))
            dV = piece.beta * dX
            dK_to = (dV @ states.mT).neg_()
            drows_through = torch.stack((dP, (dV @ U.mT).tril_(-1).neg_()))
        drows, dK, dG = decay.scores_vjp(drows_through, piece.scores, piece.rows, piece.K, piece.g)
        dQ = drows[0].add_(dQ_to if piece.to is None else dQ_to * piece.to)
        dK.add_(dK_behind if piece.behind is None else dK_behind * piece.behind)
        if piece.beta is not None:
            dK.add_(drows[1]).add_(dK_to if piece.to is None else dK_to * piece.to)
        _put(dq, tokens, dQ.mul_(call.scale))
        _put(dk, tokens, dK)
        _put(dv, tokens, dV)
        if dg is None:
            continue
        dsums_to = dQ_to.mul_(piece.Q_to)
        if piece.beta is not None:
            dsums_to.addcmul_(dK_to, piece.K_to)
        dsums_to[..., -1:, :].add_(dthrough.mul_(piece.through))
        dsums_behind = dK_behind.mul_(piece.K_behind)
        if dG.shape[-1] == 1:
            dsums_to, dsums_behind = dsums_to.sum(-1, keepdim=True), dsums_behind.sum(-1, keepdim=True)
        _put(dg, tokens, dG.add_(decay.sums_to_vjp(dsums_to)).add_(decay.sums_behind_vjp(dsums_behind)))
    return [*grads, dS if call.state_BHDV is None else dS.to(call.state_BHDV.dtype)]


def piece_count(call: Call) -> int:
    return len(pieces_of(call))


def entry_states(call: Call, run: Callable[[Call], tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The entry states of the pieces, as the forward pass `run` gives them."""
    pieces = pieces_of(call)
    if len(pieces) > 1:
        return run(call)[2]
    B, _, H, D = call.q_BTHD.shape
    if call.state_BHDV is not None:
        return call.state_BHDV.to(call.wide)[:, None]
    return call.v_BTHV.new_zeros(B, len(pieces), H, D, call.v_BTHV.shape[3], dtype=call.wide)


@dataclass(slots=True, eq=False, kw_only=True)
class _Piece:
    """Some chunks of a call, wide, ``[B, H, n, c, ...]``; decays are None where there are none."""

    K: Tensor
    V: Tensor
    g: Tensor | None
    beta: Tensor | None
    rows: Tensor
    """What meets the keys, ``[1 or 2, B, H, n, c, D]``: scaled queries, and with the delta rule the keys themselves."""
    to: Tensor | None
    """Decay from the chunk's entry to each token."""
    behind: Tensor | None
    """Decay behind each token to the chunk's end."""
    through: Tensor | None
    """Decay of the whole chunk, ``[B, H, n, 1, G]``."""
    scores: Tensor
    """P, and with the delta rule M, ``[1 or 2, B, H, n, c, c]``."""
    Q_to: Tensor
    K_to: Tensor | None
    K_behind: Tensor
    system: Tensor | None
    """I + diag(beta) M."""
    W: Tensor | None = None
    """What the entry state adds to -U: (I + diag(beta) M)^-1 diag(beta) (K A)."""

    @property
    def chunk(self) -> int:
        return self.K.shape[-2]

    @classmethod
    def make(cls, call: Call, marked_BTHG: Tensor | None, tokens: slice) -> _Piece:
        wide, chunk = call.wide, _chunk_tokens(call)
        Q, K, V = (_chunked(t[:, tokens], chunk, wide) for t in (call.q_BTHD, call.k_BTHD, call.v_BTHV))
        g = None if marked_BTHG is None else _chunked(marked_BTHG[:, tokens], chunk, wide)
        beta = None if call.beta_BTH is None else _chunked(call.beta_BTH[:, tokens, :, None], chunk, wide)
        Q = Q * call.scale
        rows = Q[None] if beta is None else torch.stack((Q, K))
        to = behind = through = None
        if g is not None:
            sums = decay.sums_to(g)
            to, through = sums.exp(), sums[..., -1:, :].exp()
            behind = decay.sums_behind(g).exp_()
        scores = decay.scores(rows, K, g)
        K_to = system = None
        if beta is not None:
            K_to = K if to is None else K * to
            scores[1].tril_(-1)
            system = beta * scores[1]
            system.diagonal(dim1=-2, dim2=-1).fill_(1)
        return cls(
            K=K, V=V, g=g, beta=beta, rows=rows, to=to, behind=behind, through=through, scores=scores, system=system, K_to=K_to,
            Q_to=Q if to is None else Q * to, K_behind=K if behind is None else K * behind,
        )  # fmt: skip

    def pass_on(self, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the state at the entry: the states at the entries of all chunks ``[B, H, n, D, V]``, U, and the state behind them."""
        states = S.new_empty(*self.K.shape[:3], *S.shape[2:])
        if self.beta is None:
            U, added = self.V, self.K_behind.mT @ self.V
        else:
            solved = torch.linalg.solve_triangular(
                self.system, self.beta * torch.cat((self.V, self.K_to), -1), upper=False, unitriangular=True
            )
            U, self.W = solved[..., : self.V.shape[-1]].contiguous(), solved[..., self.V.shape[-1] :]
        for n in range(states.shape[2]):
            states[:, :, n] = S
            if self.beta is not None:
                U[:, :, n].sub_(self.W[:, :, n] @ S)
                step = self.K_behind[:, :, n].mT @ U[:, :, n]
            else:
                step = added[:, :, n]
            S = step + (S if self.through is None else self.through[:, :, n].mT * S)
        return states, U, S

    def pass_back(self, dO: Tensor, dS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the adjoint of the state behind the chunks: dU, the adjoints at the exits of all chunks, and that at the first entry."""
        dU, dentries = self.scores[0].mT @ dO, self.Q_to.mT @ dO
        dexits = torch.empty_like(dentries)
        for n in reversed(range(dexits.shape[2])):
            dexits[:, :, n] = dS
            dU[:, :, n].add_(self.K_behind[:, :, n] @ dS)
            dS = dentries[:, :, n] + (dS if self.through is None else self.through[:, :, n].mT * dS)
            if self.W is not None:
                dS = dS - self.W[:, :, n].mT @ dU[:, :, n]
        return dU, dexits, dS


def _chunk_tokens(call: Call) -> int:
    """A short call needs no more than the power of two that holds it."""
    return min(call.chunk_size, 1 << max(0, call.q_BTHD.shape[1] - 1).bit_length())


def _piece_tokens(device: str, chunk_size: int) -> int:
    return max(PIECE_TOKENS.get(device, PIECE_TOKENS["other"]), chunk_size)


def pieces_of(call: Call) -> list[slice]:
    tokens, size = call.q_BTHD.shape[1], _piece_tokens(call.q_BTHD.device.type, call.chunk_size)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _chunked(x_BTHX: Tensor, chunk: int, wide: torch.dtype) -> Tensor:
    """``[B, H, n, c, X]``; zeros behind the last token change nothing: they are not written to the state, and nothing decays."""
    x_BHTX = x_BTHX.transpose(1, 2).to(wide)
    missing = -x_BHTX.shape[2] % chunk
    x_BHTX = F.pad(x_BHTX, (0, 0, 0, missing)) if missing else x_BHTX.contiguous()
    return x_BHTX.unflatten(2, (-1, chunk))


def _put(whole_BTHX: Tensor, tokens: slice, chunks: Tensor) -> None:
    part = whole_BTHX[:, tokens]
    part.copy_(chunks.flatten(2, 3)[:, :, : part.shape[1]].transpose(1, 2))
