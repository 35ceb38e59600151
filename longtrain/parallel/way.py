"""Attention over several ranks as one differentiable function, whatever the way the ranks go about it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Way(Protocol):
    """How ranks that each hold a part of the tokens attend to all of them. Every rank calls both functions, in the same order."""

    def attend(self, mixer, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q ``[B, n, H, D]``, k, v ``[B, n, K, D]`` of this rank's n tokens: out ``[B, n, H, Dv]``, and wide the LSE ``[B, n, H]``."""

    def attend_vjp(
        self, mixer, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of this rank's tokens; where ranks add to one sum it is wide. `delta`: see `delta_of`."""


def delta_of(dout: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """``sum_d dout * out``, ``[B, T, H]``, in the LSE's wide dtype: all that the backward pass needs of the output."""
    return (dout.to(lse.dtype) * out).sum(-1)


def attend_over_ranks(way: Way, mixer, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
    """Softmax attention of this rank's queries on the keys of all ranks, ``[B, n, H, Dv]``, differentiable in q, k, v.

    `mixer`: `longtrain.ops.mixers.AttentionMixer` (or one with its methods), in positions of the whole sequence.
    """
    return _OverRanks.apply(way, mixer, q_BTHD, k_BTKD, v_BTKD)


class _OverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, way: Way, mixer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = way.attend(mixer, q, k, v)
        ctx.way, ctx.mixer = way, mixer
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        grads = ctx.way.attend_vjp(ctx.mixer, dout, q, k, v, lse, delta_of(dout, out, lse))
        return None, None, *(grad.to(dout.dtype) for grad in grads)
