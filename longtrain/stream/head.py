"""The end of a model, streamed: part by part, hidden states become what the projection sees, and its gradient goes back.

What is made of a part, the loss (`loss.py`) or log-probabilities (`logprobs.py`), is theirs: no logits exist beyond a part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from longtrain.ops.linear_cross_entropy import default_chunk_tokens
from longtrain.span import Span, chunk_spans
from longtrain.stream.boundary import Boundary
from longtrain.stream.call import Sequenced, WholeTensor, announce
from longtrain.stream.replay import GradientSums, Surroundings


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamedHead:
    """Norm (any token-local module) and projection of a sequence, and how it is cut."""

    norm: nn.Module
    names: tuple[str, ...]
    """Of the norm's parameters."""
    boundary: Boundary | None
    """Where the hidden states are; None where they are a tensor."""
    spans: list[Span]
    """What is taken from the boundary at a time; the whole sequence when the hidden states are a tensor."""
    logits_tokens: int
    """Tokens of each row whose logits exist at one time."""
    surroundings: Surroundings

    @classmethod
    def make(
        cls, hidden_BTE: Tensor, norm: nn.Module, head: nn.Linear, boundary: Boundary | None, chunk_tokens: int | None
    ) -> StreamedHead:
        batch, length = hidden_BTE.shape[:2]
        tokens = chunk_tokens or default_chunk_tokens(head.out_features, hidden_BTE.device, hidden_BTE.dtype)
        return cls(
            norm=norm, names=tuple(name for name, _ in norm.named_parameters()), boundary=boundary,
            spans=chunk_spans(length, length or 1) if boundary is None else boundary.spans, logits_tokens=max(1, tokens // max(batch, 1)),
            surroundings=Surroundings.capture(hidden_BTE.device),
        )  # fmt: skip

    def hidden(self, hidden_BTE: Tensor) -> Sequenced:
        return WholeTensor(hidden_BTE.shape[1], hidden_BTE) if self.boundary is None else self.boundary.value

    def parts(self, span: Span) -> list[Span]:
        """A span cut into pieces of `logits_tokens`."""
        return [Span(span.start + p.start, span.start + p.stop) for p in chunk_spans(len(span), self.logits_tokens)]

    def normed(self, hidden_BCE: Tensor, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """What the projection sees."""
        with self.surroundings.restored():
            x_BCE = functional_call(self.norm, dict(zip(self.names, parameters, strict=True)), (hidden_BCE,))
        return x_BCE.to(dtype)

    def dtype(self, weight_VE: Tensor) -> torch.dtype:
        """What the projection runs in: under autocast its dtype, as a linear layer would take it, which leaves float64 as it is."""
        if weight_VE.dtype == torch.float64:
            return weight_VE.dtype
        return next((dtype for kind, on, dtype in self.surroundings.autocast if kind == weight_VE.device.type and on), weight_VE.dtype)

    def vjp(
        self,
        inputs: Sequence[Tensor],
        wanted: Sequence[bool],
        wide: torch.dtype,
        vjp_part: Callable[..., Tensor | None],
        *,
        stays: bool = False,
    ) -> list[Tensor | None]:
        """Gradients by those of `inputs` (hidden states, weight, bias, the norm's parameters) that are `wanted`, summed in `wide`.

        ``vjp_part(part, x_CE, weight_VE, want_dx=, dweight_VE=, dbias_V=)`` returns the gradient of x_CE (None without `want_dx`) and
        adds to the two others where they are not None. The gradient of hidden states that stream goes into the boundary, and what is
        returned for it is the stand-in. `stays`: the hidden states are left in the boundary.
        """
        hidden_BTE, weight_VE, bias_V, *parameters = inputs
        want_hidden, want_weight, want_bias, *want_parameters = wanted
        dtype, upstream = self.dtype(weight_VE), want_hidden or any(want_parameters)
        cast_VE = weight_VE.detach().to(dtype)
        aliases = [p.detach().requires_grad_(want) for p, want in zip(parameters, want_parameters, strict=True)]
        dweight_VE, dbias_V = (
            torch.zeros_like(t, dtype=wide) if want else None for t, want in ((weight_VE, want_weight), (bias_V, want_bias))
        )
        hidden, sums = self.hidden(hidden_BTE), GradientSums(len(parameters))
        dhidden = WholeTensor(hidden_BTE.shape[1]) if self.boundary is None else self.boundary.grad
        if self.boundary is not None:
            announce(self.boundary.value.store, ((hidden, span) for span in self.spans))
        for span in self.spans:
            x_BSE = hidden.get(span) if stays else hidden.take(span)
            dx_BSE = torch.empty_like(x_BSE) if want_hidden else None
            for part in self.parts(span):
                x_BCE = x_BSE[:, part.slice(span.start)].detach().requires_grad_(want_hidden)
                with torch.enable_grad():
                    normed_CE = self.normed(x_BCE, aliases, dtype).flatten(0, 1)
                dx_CE = vjp_part(part, normed_CE.detach(), cast_VE, want_dx=upstream, dweight_VE=dweight_VE, dbias_V=dbias_V)
                if upstream:
                    leaves = [t for t in (x_BCE, *aliases) if t.requires_grad]
                    grads = list(torch.autograd.grad(normed_CE, leaves, dx_CE))
                    if want_hidden:
                        dx_BSE[:, part.slice(span.start)] = grads.pop(0)
                    for i in (i for i, want in enumerate(want_parameters) if want):
                        sums.add(i, grads.pop(0))
            if want_hidden:
                dhidden.put(span, dx_BSE)
        if want_hidden:
            dhidden = dhidden.tensor if self.boundary is None else self.boundary.stand_in
        return [dhidden if want_hidden else None, dweight_VE, dbias_V, *sums.totals]
