"""Token ids to streamed hidden states: the embedding, chunk by chunk into the token store."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding as embed

from longtrain.stream.boundary import Boundary
from longtrain.stream.call import announce
from longtrain.stream.replay import delivered
from longtrain.stream.segment import Chain


def streamed_token_embed(input_ids_BT: Tensor, embedding: nn.Embedding, *, chain: Chain, to_loss: bool = False) -> Tensor:
    """As `longtrain.nn.TokenEmbed.forward`; returns the stand-in of the first layer's input.

    An embedding that is more than a table (hooks, noise, adapters, a padding row, gradients by frequency) is called as it is, whole.
    """
    if not _is_plain(embedding):
        chain.boundary = None
        return embedding(input_ids_BT)
    weight_VE = embedding.weight
    shape = torch.Size((*input_ids_BT.shape, weight_VE.shape[1]))
    boundary = chain.new_boundary(0, shape, weight_VE.device)
    stand_in = _Embed.apply(weight_VE, input_ids_BT, boundary)
    chain.boundary, chain.from_ids, chain.to_loss = boundary, True, to_loss
    return stand_in


def _is_plain(embedding: nn.Embedding) -> bool:
    own = type(embedding).forward is nn.Embedding.forward and "forward" not in vars(embedding)
    hooks = embedding._forward_hooks or embedding._forward_pre_hooks or embedding._backward_hooks or embedding._backward_pre_hooks
    plain = embedding.padding_idx is None and embedding.max_norm is None and not embedding.sparse and not embedding.scale_grad_by_freq
    return own and not hooks and plain


class _Embed(torch.autograd.Function):
    """(weight) -> stand-in of the hidden states; the weight's gradient is summed over the chunks in float32 or wider."""

    @staticmethod
    def forward(ctx, weight_VE: Tensor, ids_BT: Tensor, boundary: Boundary) -> Tensor:
        ctx.save_for_backward(weight_VE, ids_BT)
        ctx.boundary = boundary
        for span in boundary.spans:
            boundary.value.put(span, embed(ids_BT[:, span.slice()], weight_VE))
        return boundary.stand_in

    @staticmethod
    @once_differentiable
    def backward(ctx, dstand_in: Tensor):
        weight_VE, ids_BT = ctx.saved_tensors
        dweight_VE = torch.zeros_like(weight_VE, dtype=torch.promote_types(weight_VE.dtype, torch.float32))
        announce(ctx.boundary.grad.store, ((ctx.boundary.grad, span) for span in ctx.boundary.spans))
        for span in ctx.boundary.spans:
            dx_BCE = ctx.boundary.grad.take(span)
            dweight_VE.index_add_(0, ids_BT[:, span.slice()].flatten(), dx_BCE.flatten(0, 1).to(dweight_VE.dtype))
        return delivered(weight_VE, dweight_VE), None, None
