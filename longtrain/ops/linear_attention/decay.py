"""Decays between the tokens of a chunk, and their derivatives. Axes: n chunk, c its tokens, D features; g: log decays [..., c, 1 or D].

A decay from token j to token i is exp(g_{j+1} + ... + g_i). The sums are made of what lies between, never as differences of longer
sums and never divided out (exp(-sum) overflows): each is as exact as its own size allows, and a log decay of minus infinity, which is how
a document begins, forgets without a NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def sums_to(g: Tensor) -> Tensor:
    """``[i]``: g_1 + ... + g_i, from the chunk's entry up to and with token i."""
    return g.cumsum(-2)


def sums_behind(g: Tensor) -> Tensor:
    """``[j]``: g_{j+1} + ... + g_c, behind token j to the chunk's end."""
    return _from_end(F.pad(g[..., 1:, :], (0, 0, 0, 1)))


def sums_to_vjp(dsums: Tensor) -> Tensor:
    return _from_end(dsums)


def sums_behind_vjp(dsums: Tensor) -> Tensor:
    return F.pad(dsums.cumsum(-2)[..., :-1, :], (0, 0, 1, 0))


def scores(rows: Tensor, k: Tensor, g: Tensor | None) -> Tensor:
    """``[R, ..., c, c]``: sum over d of rows_id k_jd exp(g_{j+1,d} + ... + g_{i,d}) for j <= i, 0 elsewhere; `rows [R, ..., c, D]`."""
    if g is None:
        return (rows @ k.mT).tril_()
    if g.shape[-1] == 1:
        return (rows @ k.mT).mul_(_between(g))
    out = torch.zeros(*rows.shape[:-1], k.shape[-2], dtype=rows.dtype, device=rows.device)
    out.diagonal(dim1=-2, dim2=-1).copy_((rows * k).sum(-1))
    for half in _halves(k.shape[-2]):
        later, earlier, _, _ = _sides(rows, k, g, half)
        _blocks(out, half).copy_((later @ earlier.mT).movedim(-3, -1))
    return out


def scores_vjp(dscores: Tensor, scores: Tensor, rows: Tensor, k: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of rows, k and g; those of the scores are 0 above the diagonal."""
    if g is None:
        return dscores @ k, (dscores.mT @ rows).sum(0), None
    if g.shape[-1] == 1:
        # dg_m: of all pairs j < m <= i, the gradient of their sum
        dsums = _from_end((dscores * scores).sum(0).tril_(-1))
        draw = dscores * _between(g)
        return draw @ k, (draw.mT @ rows).sum(0), dsums.tril_(-1).sum(-1, keepdim=True)
    on_diagonal = dscores.diagonal(dim1=-2, dim2=-1)[..., None]
    drows, dk, dg = on_diagonal * k, (on_diagonal * rows).sum(0), torch.zeros_like(g)
    for half in _halves(k.shape[-2]):
        later, earlier, decay_to, decay_behind = _sides(rows, k, g, half)
        dblock = _blocks(dscores, half).movedim(-1, -3)
        dlater, dearlier = dblock @ earlier, (dblock.mT @ later).sum(0)
        _later(drows, half).add_(dlater * decay_to)
        _earlier(dk, half).add_(dearlier * decay_behind)
        _later(dg, half).add_(sums_to_vjp((dlater * later).sum(0)))
        _earlier(dg, half).add_(sums_behind_vjp(dearlier * earlier))
    return drows, dk, dg


def _from_end(x: Tensor) -> Tensor:
    """``[i]``: x_i + ... + x_c."""
    return x.flip(-2).cumsum(-2).flip(-2)


def _between(g: Tensor) -> Tensor:
    """``[i, j]``: exp(g_{j+1} + ... + g_i) for j <= i, 0 elsewhere, of one decay for all features (Mamba-2's "segsum")."""
    return g.expand(*g.shape[:-1], g.shape[-2]).tril(-1).cumsum(-2).exp_().tril_()


# With one decay a feature the scores are no matrix product. But where a pair of tokens lies on two sides of a point, its decay is that
# from the earlier one to the point times that from the point to the later one, both at most 1; and halves of halves of a chunk put every
# pair on two sides of a middle. (GLA, arXiv:2312.06635, section 4, splits a chunk once, and the smallest blocks feature by feature.)


def _halves(c: int) -> Iterator[int]:
    while c > 1:
        c //= 2
        yield c


def _earlier(x: Tensor, half: int) -> Tensor:
    """``[..., m, half, D]``: the first halves of all blocks of 2 `half` tokens."""
    return x.unflatten(-2, (-1, 2, half))[..., 0, :, :]


def _later(x: Tensor, half: int) -> Tensor:
    return x.unflatten(-2, (-1, 2, half))[..., 1, :, :]


def _blocks(matrix: Tensor, half: int) -> Tensor:
    """``[..., half, half, m]``, a view: rows of the later half of each block against columns of its earlier half."""
    pairs = matrix.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
    return pairs[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2)


def _sides(rows: Tensor, k: Tensor, g: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows decayed from the middle of their block, keys decayed up to it, and the two decays."""
    decay_to, decay_behind = sums_to(_later(g, half)).exp_(), sums_behind(_earlier(g, half)).exp_()
    return _later(rows, half) * decay_to, _earlier(k, half) * decay_behind, decay_to, decay_behind
