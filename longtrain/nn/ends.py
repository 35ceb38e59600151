"""The two ends of a language model as modules: token ids in, loss out. Their parameters stay where they are and are passed in.

`lt.apply` replaces their `forward` on the instance: hidden states then stream from the embedding through the layers into the loss, and
neither end ever holds those of the whole sequence.
"""

from __future__ import annotations

from torch import Tensor, nn

from longtrain.ops.linear_cross_entropy import LossOptions, linear_cross_entropy
from longtrain.span import IGNORE_INDEX, Layout


class TokenEmbed(nn.Module):
    """Embeds token ids; what it gives goes into the first layer as it is."""

    def forward(self, input_ids_BT: Tensor, embedding: nn.Embedding, *, to_loss: bool = False) -> Tensor:
        """Hidden states ``[B, T, E]``. `to_loss` says that what the last layer gives will go into `TokenLoss` as it is."""
        return embedding(input_ids_BT)


class TokenLoss(nn.Module):
    """Loss of ``head(norm(hidden))`` against targets; `hidden` comes from the last layer as it is."""

    def forward(
        self,
        hidden_BTE: Tensor,
        norm: nn.Module,
        head: nn.Linear,
        targets_BT: Tensor,
        *,
        normalizer: float | Tensor | None = None,
        token_weights_BT: Tensor | None = None,
        reduction: str = "mean",
        options: LossOptions = LossOptions(),
    ) -> Tensor:
        """Scalar, or ``[B, T]`` for reduction "none". `targets_BT` are already moved: target[t] is what token t predicts."""
        return linear_cross_entropy(
            norm(hidden_BTE),
            head.weight,
            targets_BT,
            bias=head.bias,
            reduction=reduction,
            normalizer=normalizer,
            token_weights=token_weights_BT,
            ignore_index=options.ignore_index,
            softcap=options.softcap,
            z_loss=options.z_loss,
            label_smoothing=options.label_smoothing,
            backend="reference",
        )


def count_targets(labels_BT: Tensor, cu_seqlens=None) -> int:
    """Tokens that have a target: labels not ignored, after the shift and within documents."""
    targets_BT = Layout.make(labels_BT.shape[1], cu_seqlens).next_token_targets(labels_BT)
    return int((targets_BT != IGNORE_INDEX).sum())
