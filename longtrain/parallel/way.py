"""What every way of attending over several ranks can be asked."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


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
