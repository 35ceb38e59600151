"""What a run asks of its model, longtrain's own or one of transformers: the loss of a packed row, logits of some positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longtrain.data.packing import Batch
from longtrain.span import Layout


def is_transformers(model: nn.Module) -> bool:
    """Whether the model has transformers' interface; longtrain's own otherwise."""
    return hasattr(model, "get_output_embeddings")


def row_loss(model: nn.Module, batch: Batch, *, normalizer: float | None = None, reduction: str = "mean") -> Tensor:
    """A scalar (the sum over `normalizer`, or the mean), or ``[1, T]`` for reduction "none". The batch is on the model's device."""
    arguments = {"cu_seqlens": batch.cu_seqlens, "normalizer": normalizer, "reduction": reduction}
    if not is_transformers(model):
        return model(batch.input_ids_BT, labels=batch.labels_BT, **arguments).loss
    from longtrain.hf.call import packed_loss  # needs transformers, an extra

    return packed_loss(model, batch.input_ids_BT, batch.labels_BT, **arguments)


def logits_at(model: nn.Module, ids_BT: Tensor, layout: Layout, at_N: Tensor) -> Tensor:
    """Logits ``[N, V]`` of the positions `at_N` of one packed row; a streamed model forms no others. Zeros where another process has
    the position."""
    if not is_transformers(model):
        return model(ids_BT, cu_seqlens=torch.tensor(layout.edges), logits_at=at_N).logits
    from longtrain.hf import call

    return call.logits_at(model, ids_BT, layout, at_N)


def vocabulary(model: nn.Module) -> int:
    """Ids below this have an embedding."""
    if not is_transformers(model):
        return model.config.vocab_size
    return model.get_input_embeddings().weight.shape[0]


def described(model: nn.Module) -> str:
    """`3,000,000 parameters (20,000 trained), 4 layers`."""
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = model.config
    layers = config.get_text_config().num_hidden_layers if is_transformers(model) else config.num_layers
    return f"{count:,} parameters" + (f" ({trained:,} trained)" if trained != count else "") + f", {layers} layers"

