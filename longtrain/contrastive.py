"""Contrastive training of encoders on long documents: batches of one sample, exact gradients, by cached embeddings (GradCache, Gao et al.
2021, arXiv:2101.06983). Only the embeddings of a batch exist together, never two samples' activations.

    loss = backward_by_sample(encoder, [*queries, *documents], lambda e: info_nce(e[:n], e[n:]))
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtrain.stream.replay import RandomStates


def info_nce(queries_NE: Tensor, documents_NE: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Mean cross entropy of finding each query's own document among all N (van den Oord et al. 2018, arXiv:1807.03748), by cosine.

    Raises ValueError for other than two matrices of one shape.
    """
    if queries_NE.ndim != 2 or queries_NE.shape != documents_NE.shape:
        raise ValueError(f"queries and documents must be pairs [N, E], found {list(queries_NE.shape)} and {list(documents_NE.shape)}")
    cosine_NN = F.normalize(queries_NE, dim=-1) @ F.normalize(documents_NE, dim=-1).mT
    return F.cross_entropy(cosine_NN / temperature, torch.arange(len(queries_NE), device=queries_NE.device))


def backward_by_sample(encoder: nn.Module, samples: Sequence[Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradients of ``loss(stack([encoder(s) for s in samples]))``, added to every ``.grad``, with one sample's graph at a time.

    Every sample is embedded without a graph; the loss gives the gradient of each embedding; every sample is embedded once more, with
    the same random numbers (dropout), and its gradient goes back from there: a step costs one forward pass more. `encoder` gives
    vectors ``[E]`` and may be streamed (`lt.apply`); it must not change in forward (batch statistics). `loss` may have parameters.

    Returns the loss, detached. Raises ValueError for no samples, and for embeddings that are not vectors.
    """
    if not samples:
        raise ValueError("backward_by_sample needs at least one sample, found none")
    random, embedded = RandomStates(next(encoder.parameters()).device), []
    for number, sample in enumerate(samples):
        with torch.no_grad(), random.recorded(number):
            embedded.append(encoder(sample))
        if embedded[-1].ndim != 1:
            raise ValueError(f"the encoder must give one vector [E] a sample, found {list(embedded[-1].shape)}; index or pool its output")
    embedded_NE = torch.stack(embedded).requires_grad_()
    value = loss(embedded_NE)
    value.backward()
    for number, sample in enumerate(samples):
        with random.restored(number):
            again_E = encoder(sample)
        again_E.backward(embedded_NE.grad[number])
    return value.detach()
