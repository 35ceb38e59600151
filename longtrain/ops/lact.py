"""Large-chunk test-time training (LaCT; Zhang et al. 2025, arXiv:2505.23884): a small network's weights are the memory of a head.

    read      f_W(x) = (silu(x W1^T) * (x W3^T)) W2                                    SwiGLU; W1, W3, W2 each [F, D]
    learn     G = sum over the tokens of a chunk of -d/dW rate_t (-f_W(k_t) . v_t)     each matrix with a rate of its own
    update    M = momentum M + G;   W = rescaled(W + M)                                once a chunk; columns keep the norms they began with

A chunk is read with the weights of the chunks before it, so tokens of one chunk do not see each other: a layer of windows beside it does
that (as in the paper). Without the paper's Muon, and with one momentum for all tokens. Chunks are counted from each document's first token,
where weights are the learned initial ones.

The gradient of a chunk is a sum over its tokens, so a stretch of the sequence may begin and end anywhere: what is carried is (W, M, G).
Axes: B batch, H heads, t tokens, D features of a head, F inner features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longtrain.span import Layout, Span

_TINY = 1e-5


def footprint_bytes(tokens: int, heads: int, dim: int, inner: int, chunk_tokens: int, *, itemsize: int = 4) -> int:
    """What the backward pass of so many tokens holds, for a batch of one: 16 tensors as wide as F and 4 as wide as D, and for every
    update of the weights five of their size (counted)."""
    return heads * itemsize * (tokens * (16 * inner + 4 * dim) + 5 * 3 * inner * dim * (tokens // chunk_tokens + 2))


def flops(tokens: int, *, heads: int, dim: int, inner: int, backward: bool = False) -> float:
    """Of matrix products, for a batch of one: three that read, three and their three gradients that learn, each 2 F D a token. Backward
    runs forward again, and differentiates each product by two factors."""
    return tokens * heads * 18 * inner * dim * (3 if backward else 1)


def lact(
    state: Tensor | None,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    rates_BTH3: Tensor,
    weights_H3FD: Tensor,
    *,
    span: Span,
    chunk_tokens: int,
    momentum: float = 0.0,
    documents: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, T, H, D]`` in q's dtype for the tokens of `span`, and the state behind them, ``[B, H, 3, 3, F, D]`` of (W, M, G) by
    (W1, W3, W2), float32 at least. `state`: that before them, None before the first token. `rates`: of (W1, W3, W2). Plain torch.
    """
    inputs = (q_BTHD, k_BTHD, v_BTHD, rates_BTH3, weights_H3FD)
    wide = torch.float32
    for tensor in inputs:
        wide = torch.promote_types(wide, tensor.dtype)
    with torch.autocast(q_BTHD.device.type, enabled=False):
        q_BHTD, k_BHTD, v_BHTD, rates_BHT3 = (x.transpose(1, 2).to(wide) for x in inputs[:4])
        first = weights_H3FD.to(wide).expand(q_BTHD.shape[0], *weights_H3FD.shape)
        fresh = torch.stack((first, torch.zeros_like(first), torch.zeros_like(first)), dim=2)
        norms = _norms(first)
        outs = [q_BHTD[:, :, :0]]
        state = fresh if state is None else state
        for part, event in cuts(span, chunk_tokens, documents):
            if event == "begin":
                state = fresh
            elif event == "update":
                state = _updated(state, norms, momentum)
            at = part.slice(span.start)
            W, M, G = state.unbind(dim=2)
            outs.append(_read(W, q_BHTD[:, :, at]))
            G = G + _learned(W, k_BHTD[:, :, at], v_BHTD[:, :, at], rates_BHT3[:, :, at])
            state = torch.stack((W, M, G), dim=2)
        return torch.cat(outs, dim=2).transpose(1, 2).to(q_BTHD.dtype), state


def cuts(span: Span, chunk_tokens: int, documents: Layout | None) -> Iterator[tuple[Span, Literal["begin", "update"] | None]]:
    """`span` in the parts that are read with the same weights, and what happens before each."""
    edges = (0, span.stop) if documents is None else documents.edges
    for start, stop in zip(edges, edges[1:], strict=False):
        common = span & Span(start, stop)
        if not len(common):
            continue
        for part in common.split(*range(start + (common.start - start) // chunk_tokens * chunk_tokens, common.stop, chunk_tokens)):
            done = part.start - start
            yield part, "begin" if done == 0 else "update" if done % chunk_tokens == 0 else None


def _read(W: Tensor, x_BHtD: Tensor) -> Tensor:
    W1, W3, W2 = W.unbind(dim=2)
    return (F.silu(x_BHtD @ W1.mT) * (x_BHtD @ W3.mT)) @ W2


def _learned(W: Tensor, k_BHtD: Tensor, v_BHtD: Tensor, rates_BHt3: Tensor) -> Tensor:
    """G of these tokens: minus the gradients of -f_W(k) . v, written out, so that autograd can differentiate them once more."""
    W1, W3, W2 = W.unbind(dim=2)
    rate1, rate3, rate2 = rates_BHt3.split(1, dim=-1)
    gate, up, dhidden = k_BHtD @ W1.mT, k_BHtD @ W3.mT, v_BHtD @ W2.mT
    sigmoid = gate.sigmoid()
    silu, dsilu = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    G1 = (rate1 * dhidden * up * dsilu).mT @ k_BHtD
    G3 = (rate3 * dhidden * silu).mT @ k_BHtD
    G2 = (rate2 * silu * up).mT @ v_BHtD
    return torch.stack((G1, G3, G2), dim=2)


def _updated(state: Tensor, norms: tuple[Tensor, Tensor], momentum: float) -> Tensor:
    W, M, G = state.unbind(dim=2)
    M = momentum * M + G
    W = W + M
    rows, columns = _norms(W)
    W = torch.cat((W[:, :, :2] * (norms[0] / (rows + _TINY)), W[:, :, 2:] * (norms[1] / (columns + _TINY))), dim=2)
    return torch.stack((W, M, torch.zeros_like(G)), dim=2)


def _norms(W: Tensor) -> tuple[Tensor, Tensor]:
    """Of what each output is made with: the rows of W1 and W3, the columns of W2."""
    return W[:, :, :2].norm(dim=-1, keepdim=True), W[:, :, 2:].norm(dim=-2, keepdim=True)
