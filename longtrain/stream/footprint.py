"""What streaming a layer costs in bytes a token, probed on the layer's own tiny example: the planner adds these up.

    x        one boundary between layers, E elements
    output   what the mixers give for a token, with its LSE (`lse` of it): kept for the stored share
    carry    K/V of a token; adjoint: their accumulators, float32 or wider
    state    of fixed size instead: what a chunk's entry state takes (bytes, not bytes a token)
    graph    what a chunk holds while it is replayed and differentiated, at its highest (`longtrain.stream.work`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from sys import maxsize
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from longtrain.span import Span, whole_chunks
from longtrain.stream.carry import is_causal, make_carry
from longtrain.stream.replay import BareLayer, Mix, call_layer
from longtrain.stream.sliding import capacity
from longtrain.stream.work import Counting, Line, Work, highest, lines, work_between

PROBE_TOKENS = (24, 56)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFootprint:
    """Bytes a token of a batch of one, and the parameters' bytes; all in the dtypes the layer has now."""

    x: int
    arguments: int
    """Tensors that the layer is given beside the hidden states (positions, rotary tables): the same in every layer, or those of all."""
    output: int
    lse: int
    carry: int
    adjoint: int
    graph_lines: tuple[Line, ...]
    """Of the moments of a chunk's replay and backward pass those that can be the highest; a chunk's parameter gradients are in it, mixer
    outputs and what the carry holds are not."""
    saved: Line
    """When the replay ends and the backward pass begins."""
    mixing: Line
    """When the mixer is differentiated."""
    forward: Work
    """Of the layer without its mixers."""
    to_mix: Work
    """The part of `forward` before the last mixer: what keys and values cost to make again."""
    backward: Work
    """Of a chunk's backward pass, without replay and mixers."""
    parameters: int
    parameter_gradients: int
    """Their sums over chunks, float32 or wider."""
    delivered_gradients: int
    """What `.grad` holds of them afterwards."""
    chunk_gradients: int
    """Of one chunk, in the parameters' dtype."""
    causal: bool
    mixers: tuple
    state: int = 0
    workspaces: tuple[Callable[[int], int], ...] = ()
    """What `mix_vjp` holds of a chunk of so many tokens, mixer by mixer."""
    mixing_work: tuple[dict[str, Callable[..., float]], ...] = ()
    """Of each mixer that is no attention: FLOP of ``(tokens, backward=)`` of a batch of one, by the ways to do it."""
    in_passes: LayerFootprint | None = None
    """The same in chunks that a filter reaches back further than, where that makes a difference."""

    def at(self, chunk_tokens: int) -> LayerFootprint:
        """What it costs under a plan of such chunks: a convolution with more taps runs in two passes, by channel group."""
        by_span = self.in_passes is None or all(is_causal(mixer, chunk_tokens) for mixer in self.mixers)
        return self if by_span else self.in_passes

    @property
    def graph(self) -> int:
        """Bytes a token at the highest moment of a long chunk."""
        return round(max((slope for slope, _ in self.graph_lines), default=0))

    def graph_bytes(self, chunk: int) -> float:
        return highest(self.graph_lines, chunk)

    def saved_bytes(self, chunk: int) -> float:
        return highest([self.saved], chunk)

    def mixing_bytes(self, chunk: int) -> float:
        """With the workspace of `mix_vjp`."""
        return highest([self.mixing], chunk) + max((workspace(chunk) for workspace in self.workspaces), default=0)

    def kept_outputs(self, kept: Span, chunk: int) -> Span:
        """The tokens whose outputs are stored where a plan says `kept`: a state carry stores those of whole chunks."""
        return whole_chunks(kept, chunk) if self.state and not self.carry else kept

    def carry_tokens(self, tokens: int, chunk: int) -> int:
        """Tokens that the carry's buffers hold: all, or as far as a chunk's queries see."""
        return capacity(tokens - self.first_key(Span(max(0, tokens - chunk), tokens), chunk), tokens)

    def first_key(self, span: Span, chunk: int) -> int:
        """Where the first chunk begins that `span` sees."""
        firsts = [mixer.keys_for(span).start if self.causal and hasattr(mixer, "keys_for") else 0 for mixer in self.mixers]
        return min(firsts, default=0) // chunk * chunk

    def carry_bytes(self) -> int:
        """Of one token while its layer runs backward; with two passes the output and its gradient are held whole as well."""
        return self.carry + self.adjoint + (0 if self.causal else 2 * self.output)


def probe_layer(layer: nn.Module) -> LayerFootprint:
    """Run `layer` on two tiny examples and read off the slope of what is saved and passed. `.grad` is not touched."""
    by_span = _probe(layer, maxsize)
    needs_long_chunks = by_span.causal and not all(is_causal(mixer, 0) for mixer in by_span.mixers)
    return replace(by_span, in_passes=_probe(layer, 0)) if needs_long_chunks else by_span


def _probe(layer: nn.Module, chunk_tokens: int) -> LayerFootprint:
    seen = [_observe(layer, tokens, chunk_tokens) for tokens in PROBE_TOKENS]
    counted = [observed.pop("counting") for observed in seen]
    small, large = seen
    fixed = {key: large.pop(key) for key in ("mixers", "state", "workspaces", "mixing_work", "causal")}
    moments = ("begun", "mixed", "ended", "differentiated", "forward_operations", "at_mixers")
    moments = {key: (small.pop(key), large.pop(key)) for key in moments}
    slopes = {key: (large[key] - small[key]) // (PROBE_TOKENS[1] - PROBE_TOKENS[0]) for key in large}
    trainable = [p for p in layer.parameters() if p.requires_grad]
    of = lambda first, last: work_between(moments[first], moments[last], PROBE_TOKENS)
    before = [c.levels[: n or None][-1:] or [0] for c, n in zip(counted, moments["forward_operations"], strict=True)]
    return LayerFootprint(
        x=slopes["x"],
        arguments=slopes["arguments"],
        output=slopes["output"],
        lse=slopes["lse"],
        carry=slopes["carry"],
        adjoint=slopes["adjoint"],
        graph_lines=lines([c.levels for c in counted], PROBE_TOKENS),
        saved=lines(before, PROBE_TOKENS)[0],
        mixing=lines(moments["at_mixers"], PROBE_TOKENS)[0],
        forward=of("begun", "ended"),
        to_mix=of("begun", "mixed"),
        backward=of("ended", "differentiated"),
        parameters=sum(p.nbytes for p in layer.parameters()),
        parameter_gradients=sum(p.numel() * max(p.element_size(), 4) for p in trainable),
        delivered_gradients=sum(map(gradient_bytes, trainable)),
        chunk_gradients=sum(p.nbytes for p in trainable),
        **fixed,
    )


def gradient_bytes(parameter: Tensor) -> int:
    """What `.grad` (or `main_grad`) holds of a parameter between a step's backward pass and its optimizer (`stream.replay.delivered`)."""
    if (main_grad := getattr(parameter, "main_grad", None)) is not None:
        return main_grad.nbytes
    dtype = getattr(parameter, "grad_dtype", parameter.dtype)
    return parameter.numel() * (torch.promote_types(parameter.dtype, torch.float32) if dtype is None else dtype).itemsize


def _observe(layer: nn.Module, tokens: int, chunk_tokens: int) -> dict[str, Any]:
    device = next(layer.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        x, arguments = layer.example(tokens)
        given = sum({id(t): t.nbytes for t in tree_leaves(arguments) if isinstance(t, Tensor)}.values())
        nothing = dict.fromkeys(("output", "lse", "carry", "adjoint", "state"), 0)
        seen = {"x": x.nbytes // x.shape[0], "arguments": given, **nothing, "workspaces": (), "mixing_work": ()}
        counting = seen["counting"] = Counting(tokens)

        def observed(mixer, *inputs: Tensor) -> Tensor:
            if causal and hasattr(mixer, "carried"):
                return mixer.carried(lambda q, *written: noted(mixer, written, q, *written), *inputs)
            return noted(mixer, inputs, *inputs)

        def noted(mixer, mixed: Sequence[Tensor], *inputs: Tensor) -> Tensor:
            seen["mixed"] = counting.so_far()
            with counting.paused(), torch.no_grad():
                out = mixer(*mixed)
                carry = None
                if causal:
                    carry = make_carry(mixer, [Span(0, tokens)])
                    carry.append(Span(0, tokens), *inputs[1:])
                is_state = carry is not None and carry.spec.kind == "state"
                lse = out.shape[:3].numel() * 4 if out.ndim == 4 and not is_state else 0
                seen["output"] += out.nbytes + lse
                seen["lse"] += lse
                seen["mixing_work"] += (mixer.work(*mixed),) if hasattr(mixer, "work") else ()
                if carry is not None:
                    seen["state"] += carry.spec.state_bytes
                    seen["workspaces"] += (carry.spec.workspace,) if carry.spec.workspace else ()
                    seen["carry"] += carry.spec.bytes_per_token * tokens
                    seen["adjoint"] += carry.spec.adjoint_bytes_per_token * tokens
                else:  # two passes hold the inputs and their gradients whole
                    seen["carry"] += sum(t.nbytes for t in inputs)
                    seen["adjoint"] += sum(t.nbytes for t in inputs)
            return _Node.apply(counting, out, is_state, *inputs)

        bare = BareLayer(layer)
        aliases = {name: p.detach().requires_grad_(p.requires_grad) for name, p in bare.named_parameters()}  # as replays have them
        parameters = [p for p in aliases.values() if p.requires_grad]
        x.requires_grad_()
        with counting:
            seen["begun"] = seen["mixed"] = counting.so_far()
            mixers = layer.mixers(**arguments)
            causal = all(is_causal(mixer, chunk_tokens) for mixer in mixers)
            y = call_layer(bare, x, arguments, Mix([partial(observed, mixer) for mixer in mixers]), aliases)
            seen["ended"], seen["forward_operations"] = counting.so_far(), len(counting.levels)
            with counting.paused():
                dy = torch.ones_like(y)
            grads = torch.autograd.grad(y, [x, *parameters], dy, allow_unused=True)
            seen["differentiated"] = counting.so_far()
            seen["at_mixers"] = [max(counting.noted, default=0)]
            del grads, y
    return {**seen, "mixers": tuple(mixers), "causal": causal}


class _Node(torch.autograd.Function):
    """Stands for the mixer in the graph: holds what the streaming node holds (output and query; with a state all inputs), and gives
    gradients of zeros: new tensors, or views where the carry's own sums are handed out (`KVCarry.take_grad`)."""

    @staticmethod
    def forward(ctx, counting: Counting, out: Tensor, is_state: bool, *inputs: Tensor) -> Tensor:
        ctx.counting, ctx.is_state = counting, is_state
        ctx.like = [(t.shape, t.dtype) for t in inputs]
        ctx.save_for_backward(out, *(inputs if is_state else inputs[:1]))
        return out.view_as(out)

    @staticmethod
    def backward(ctx, dout: Tensor):
        ctx.counting.noted.append(ctx.counting.now)
        grads = []
        for place, (shape, dtype) in enumerate(ctx.like):
            if place and dtype.itemsize >= 4 and not ctx.is_state:
                with ctx.counting.paused():
                    grads.append(dout.new_zeros((), dtype=dtype).expand(shape))
            else:
                grads.append(dout.new_zeros(shape, dtype=dtype))
        return None, None, None, *grads
