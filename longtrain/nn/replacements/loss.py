"""A classifier's or language model's last `torch.nn.Linear` and its `torch.nn.CrossEntropyLoss` as one module, without the logits."""

from __future__ import annotations

from torch import Tensor, nn

from longtrain.ops.linear_cross_entropy import linear_cross_entropy


class LinearCrossEntropy(nn.Linear):
    """``CrossEntropyLoss(...)(Linear(...)(input), target)``. State: the linear layer's ``weight [V, E]`` and ``bias [V]``.

    Arguments are those of the two; `class_weights [V]` is the loss's `weight`. Called without a target it gives the logits, as the
    linear layer does. Raises ValueError for class probabilities as targets, and for class weights together with label smoothing.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None, *, class_weights: Tensor | None = None,
        ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0, chunk_tokens: int | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if class_weights is not None and label_smoothing:
            raise ValueError("class_weights and label_smoothing together weigh every class of every token: give one of them")
        self.ignore_index, self.reduction, self.label_smoothing, self.chunk_tokens = ignore_index, reduction, label_smoothing, chunk_tokens
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, input: Tensor, target: Tensor | None = None) -> Tensor:
        """input ``[..., E]``, target ``[...]`` int64; a scalar, or ``[...]`` for reduction "none", float32 or wider."""
        if target is None:
            return super().forward(input)
        token_weights = normalizer = None
        if self.class_weights is not None:
            ignored = target == self.ignore_index
            token_weights = self.class_weights[target.masked_fill(ignored, 0)].masked_fill(ignored, 0)
            normalizer = token_weights.sum() if self.reduction == "mean" else None
        return linear_cross_entropy(
            input, self.weight, target, bias=self.bias, ignore_index=self.ignore_index, reduction=self.reduction, normalizer=normalizer,
            token_weights=token_weights, label_smoothing=self.label_smoothing, chunk_tokens=self.chunk_tokens,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reduction={self.reduction!r}"
