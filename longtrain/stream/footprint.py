"""What streaming a layer costs in bytes a token, probed on the layer's own tiny example: the planner adds these up.

    x        one boundary between layers, E elements
    output   what the mixers give for a token, with its LSE (`lse` of it): kept for the stored share
    carry    K/V of a token; adjoint: their accumulators, float32 or wider
    state    of fixed size instead: what a chunk's entry state takes (bytes, not bytes a token)
    graph    what autograd saves of a token while its chunk is replayed, with what the backward of a chunk holds at once
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from sys import maxsize

import torch
from torch import Tensor, nn

from longtrain.stream.carry import is_causal, make_carry
from longtrain.span import Span, whole_chunks
from longtrain.stream.replay import BareLayer, Mix, call_layer
from longtrain.stream.sliding import capacity

PROBE_TOKENS = (24, 56)
GRADIENTS_AT_ONCE = 3
"""Gradients of the widest activation that are alive at one time in a chunk's backward (SwiGLU: of product, gate and up)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFootprint:
    """Bytes a token of a batch of one, and the parameters' bytes; all in the dtypes the layer has now."""

    x: int
    output: int
    lse: int
    carry: int
    adjoint: int
    graph: int
    parameters: int
    parameter_gradients: int
    causal: bool
    mixers: tuple
    state: int = 0
    workspaces: tuple[Callable[[int], int], ...] = ()
    """What `mix_vjp` holds of a chunk of so many tokens, mixer by mixer."""
    in_passes: LayerFootprint | None = None
    """The same in chunks that a filter reaches back further than, where that makes a difference."""

    def at(self, chunk_tokens: int) -> LayerFootprint:
        """What it costs under a plan of such chunks: a convolution with more taps runs in two passes, by channel group."""
        by_span = self.in_passes is None or all(is_causal(mixer, chunk_tokens) for mixer in self.mixers)
        return self if by_span else self.in_passes

    def kept_outputs(self, kept: Span, chunk: int) -> Span:
        """The tokens whose outputs are stored where a plan says `kept`: a state carry stores those of whole chunks."""
        return whole_chunks(kept, chunk) if self.state and not self.carry else kept

    def carry_tokens(self, tokens: int, chunk: int) -> int:
        """Tokens that the carry's buffers hold: all, or as far as a chunk's queries see."""
        last = Span(max(0, tokens - chunk), tokens)
        firsts = [mixer.keys_for(last).start if self.causal and hasattr(mixer, "keys_for") else 0 for mixer in self.mixers]
        first = min(firsts, default=0) // chunk * chunk
        return capacity(tokens - first, tokens)

    def carry_bytes(self) -> int:
        """Of one token while its layer runs backward; with two passes the output and its gradient are held whole as well."""
        return self.carry + self.adjoint + (0 if self.causal else 2 * self.output)


def probe_layer(layer: nn.Module) -> LayerFootprint:
    """Run `layer` on two tiny examples and read off the slope of what is saved and passed. `.grad` is not touched."""
    by_span = _probe(layer, maxsize)
    needs_long_chunks = by_span.causal and not all(is_causal(mixer, 0) for mixer in by_span.mixers)
    return replace(by_span, in_passes=_probe(layer, 0)) if needs_long_chunks else by_span


def _probe(layer: nn.Module, chunk_tokens: int) -> LayerFootprint:
    small, large = (_observe(layer, tokens, chunk_tokens) for tokens in PROBE_TOKENS)
    fixed = {key: large.pop(key) for key in ("mixers", "state", "workspaces", "causal")}
    slopes = {key: (large[key] - small[key]) // (PROBE_TOKENS[1] - PROBE_TOKENS[0]) for key in large}
    trainable = [p for p in layer.parameters() if p.requires_grad]
    return LayerFootprint(
        x=slopes["x"],
        output=slopes["output"],
        lse=slopes["lse"],
        carry=slopes["carry"],
        adjoint=slopes["adjoint"],
        graph=slopes["saved"] + GRADIENTS_AT_ONCE * slopes["widest"],
        parameters=sum(p.nbytes for p in layer.parameters()),
        parameter_gradients=sum(p.numel() * max(p.element_size(), 4) for p in trainable),
        **fixed,
    )


def _observe(layer: nn.Module, tokens: int, chunk_tokens: int) -> dict[str, int]:
    device = next(layer.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        x, arguments = layer.example(tokens)
        seen = {"x": x.nbytes // x.shape[0], **dict.fromkeys(("output", "lse", "carry", "adjoint", "widest", "state"), 0), "workspaces": ()}
        parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        storages: dict[int, int] = {}

        def saved(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
                seen["widest"] = max(seen["widest"], storage.nbytes())
            return tensor

        def observed(mixer, *inputs: Tensor) -> Tensor:
            if causal and hasattr(mixer, "carried"):
                return mixer.carried(lambda q, *written: noted(mixer, written, q, *written), *inputs)
            return noted(mixer, inputs, *inputs)

        def noted(mixer, mixed: Sequence[Tensor], *inputs: Tensor) -> Tensor:
            with torch.no_grad():
                out = mixer(*mixed)
            carry = None
            if causal:
                carry = make_carry(mixer, [Span(0, tokens)])
                carry.append(Span(0, tokens), *inputs[1:])
            is_state = carry is not None and carry.spec.kind == "state"
            lse = out.shape[:3].numel() * 4 if out.ndim == 4 and not is_state else 0
            seen["output"] += out.nbytes + lse
            seen["lse"] += lse
            if carry is not None:
                seen["state"] += carry.spec.state_bytes
                seen["workspaces"] += (carry.spec.workspace,) if carry.spec.workspace else ()
                seen["carry"] += carry.spec.bytes_per_token * tokens
                seen["adjoint"] += carry.spec.adjoint_bytes_per_token * tokens
            else:  # two passes hold the inputs and their gradients whole
                seen["carry"] += sum(t.nbytes for t in inputs)
                seen["adjoint"] += sum(t.nbytes for t in inputs)
            return _Node.apply(out, len(inputs) if is_state else 1, *inputs)

        # Everything saved stays alive until the graph goes, so that no address is counted for two tensors.
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
            mixers = layer.mixers(**arguments)
            causal = all(is_causal(mixer, chunk_tokens) for mixer in mixers)
            mix = Mix([partial(observed, mixer) for mixer in mixers])
            y = call_layer(BareLayer(layer), x.requires_grad_(), arguments, mix, None)
        del y
    return {**seen, "saved": sum(storages.values()), "mixers": tuple(mixers), "causal": causal}


class _Node(torch.autograd.Function):
    """Stands for the mixer in the graph: holds what the streaming node holds (output and query; with a state all inputs)."""

    @staticmethod
    def forward(ctx, out: Tensor, held: int, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(out, *inputs[:held])
        return out.view_as(out)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        raise NotImplementedError("a probe is not differentiated")


