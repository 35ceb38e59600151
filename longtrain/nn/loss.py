"""The language-model head: final norm, projection to the vocabulary, next-token loss."""

from __future__ import annotations

from torch import Tensor, nn

from longtrain.ops.linear_cross_entropy import LossOptions, linear_cross_entropy
from longtrain.span import IGNORE_INDEX, Layout


class TokenLoss(nn.Module):
    """Loss of ``head(norm(hidden))`` against targets. Parameters stay where they are and are passed in: this module has none.

    `lt.apply` replaces its `forward` on the instance by the streamed loss, which never forms more than a chunk of logits.
    """

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
