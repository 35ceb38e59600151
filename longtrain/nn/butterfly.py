"""A transform of two block-diagonal matrices that begins as the DFT and is learned (FlashButterfly, arXiv:2302.06646, section 3.3).

A DFT of size n = p q is two rounds of small ones (Cooley and Tukey 1965). With input t = t1 q + t2, output f = f1 + p f2 and
w_n = exp(-2 pi i / n):

    X[f1, f2] = sum over t2 of  second[f1][f2, t2]  sum over t1 of  first[t2][f1, t1]  x[t1, t2]
    first[t2][f1, t1] = w_p^(t1 f1) w_n^(t2 f1)          second[f1][f2, t2] = w_q^(t2 f2)

Learned, every block goes its own way. Products of spectra do not care for the order of f, so nothing is permuted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from longtrain.span import Layout


class Butterfly(nn.Module):
    """The transform of `size` values and its inverse, each learned by itself. `size`: a power of two, at least 4.

    State, complex as ``[..., 2]``: ``first, inverse_first [q, p, p, 2]``, ``second, inverse_second [p, q, q, 2]``.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 4 or size & (size - 1):
            raise ValueError(f"a butterfly's size must be a power of two of at least 4, found {size}")
        p = 1 << ((size.bit_length() - 1) // 2)
        q, self.size = size // p, size
        f1, t1, f2, t2 = (torch.arange(n, dtype=torch.float64) for n in (p, p, q, q))
        first = (f1[:, None] * t1 / p) + (t2[:, None, None] * f1[:, None] / size)
        second = (f2[:, None] * t2 / q).expand(p, q, q)
        self.first, self.second = nn.Parameter(_turns(first)), nn.Parameter(_turns(second))
        self.inverse_first = nn.Parameter(_turns(-first.mT) / p)
        self.inverse_second = nn.Parameter(_turns(-second.mT) / q)

    def extra_repr(self) -> str:
        return str(self.size)


def _turns(angle: Tensor) -> Tensor:
    """``exp(-2 pi i angle)`` as pairs of real numbers, in the default dtype."""
    return torch.stack([(2 * math.pi * angle).cos(), -(2 * math.pi * angle).sin()], dim=-1).to(torch.get_default_dtype())


def transform(x_n: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``[..., n]``, real, to ``[..., p, q]``, complex."""
    q, p = first.shape[0], second.shape[0]
    x_qp = x_n.unflatten(-1, (p, q)).mT
    first, second = torch.view_as_complex(first), torch.view_as_complex(second)
    z_qp = torch.einsum("qfp,...qp->...qf", first, x_qp.to(first.dtype))
    return torch.einsum("pfq,...qp->...pf", second, z_qp)


def inverse(x_pq: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``[..., p, q]`` back to ``[..., n]``: the real part."""
    first, second = torch.view_as_complex(first), torch.view_as_complex(second)
    z_pq = torch.einsum("ptq,...pq->...pt", second, x_pq)
    return torch.einsum("qtp,...pq->...tq", first, z_pq).real.flatten(-2)


@dataclass(frozen=True, kw_only=True)
class ButterflyMixer:
    """Two-sided convolution whose transforms are learned; inputs and output as of `longtrain.ops.mixers.LongConvMixer`.

    `factors`: of a `Butterfly`: first, second, inverse_first, inverse_second. A document has at most ``size - W // 2`` tokens, so that
    before anything is learned nothing wraps around. It sees the future, so it streams by channel group.
    """

    filter: Tensor
    skip: Tensor
    factors: tuple[Tensor, ...]
    documents: Layout | None = None
    group_channels: int = 32
    causal = False

    def __call__(self, u_BTE: Tensor, gate_in_BTE: Tensor | None = None, gate_out_BTE: Tensor | None = None) -> Tensor:
        first, second, inverse_first, inverse_second = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in self.factors)
        size, taps = first.shape[0] * first.shape[1], self.filter.shape[1]
        k_EW, past = self.filter.to(first.dtype), (taps + 1) // 2
        k_En = torch.cat([k_EW[:, :past], k_EW.new_zeros(len(k_EW), size - taps), k_EW[:, past:]], dim=1)
        spectrum = transform(k_En, first, second)
        v_BTE = u_BTE if gate_in_BTE is None else u_BTE * gate_in_BTE
        parts = []
        for start, stop in self._edges(v_BTE.shape[1]):
            if stop - start + taps // 2 > size:
                raise ValueError(
                    f"a butterfly of size {size} with {taps} taps takes documents of {size - taps // 2} tokens, found {stop - start}; "
                    "build the layer for more tokens"
                )
            rows = torch.nn.functional.pad(v_BTE[:, start:stop].mT.to(k_En.dtype), (0, size - (stop - start)))
            y_BEn = inverse(transform(rows, first, second) * spectrum, inverse_first, inverse_second)
            parts.append(y_BEn[..., : stop - start].mT)
        y_BTE = torch.cat(parts, dim=1) + self.skip * v_BTE
        return (y_BTE if gate_out_BTE is None else y_BTE * gate_out_BTE).to(u_BTE.dtype)

    def _edges(self, tokens: int) -> list[tuple[int, int]]:
        edges = (0, tokens) if self.documents is None else self.documents.edges
        return [(a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a]

    @property
    def shared(self) -> tuple[Tensor, ...]:
        return self.filter, self.skip, *self.factors

    def with_shared(self, filter: Tensor, skip: Tensor, *factors: Tensor) -> ButterflyMixer:
        return replace(self, filter=filter, skip=skip, factors=factors)

    def by_group(self, *inputs_BTE: Tensor) -> Iterator[tuple[slice, ButterflyMixer, tuple[Tensor, ...]]]:
        """`group_channels` channels at a time: (slice of the output's axis 2, mixer, inputs). The factors serve all of them."""
        for start in range(0, inputs_BTE[0].shape[2], self.group_channels):
            channels = slice(start, start + self.group_channels)
            mixer = self.with_shared(self.filter[channels], self.skip[channels], *self.factors)
            yield channels, mixer, tuple(x[:, :, channels] for x in inputs_BTE)
