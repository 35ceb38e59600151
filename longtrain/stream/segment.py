"""A segment of layers as one autograd Function, and the `forward` that takes the place of its layers' own.

The Function's inputs are the hidden states, the differentiable arguments and every parameter, each explicitly: gradients reach them
once, so DDP, FSDP2 and hooks on parameters see an ordinary node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longtrain.offload import TokenStore, version_of
from longtrain.plan import Plan
from longtrain.span import Span, chunk_spans
from longtrain.stream import causal, twopass
from longtrain.stream.boundary import Boundary, Enter, Leave
from longtrain.stream.call import Call, Replica, WholeTensor
from longtrain.stream.carry import is_causal
from longtrain.stream.protocol import Spread
from longtrain.stream.replay import Arguments, BareLayer

Progress = Callable[[str, int, int], None]


class Chain:
    """A run of segments that follow each other in the model, and the boundary that is between two of them at the moment.

    It belongs to one `lt.apply`, and only checks that a layer is given just what the layer before it gave out.
    """

    def __init__(self, plan: Plan, store: TokenStore) -> None:
        self.plan, self.store = plan, store
        self.check_replay = False
        self.progress: Progress | None = None
        self.boundary: Boundary | None = None
        self.from_ids = False
        """Whether this pass began at the embedding, which made the first boundary."""
        self.to_loss = False
        """Whether this pass ends in the streamed loss, which takes the last boundary."""
        self.leave: Callable[[Tensor, Boundary], Tensor] = Leave.apply
        """What makes of the last stand-in and its boundary what the last layer gives out, where no streamed loss takes them."""
        self.unfinished: Segment | None = None
        """The segment whose first layer has run it, and whose other layers have not yet been called."""
        self.spread: Callable[[int], Spread] | None = None
        """How the sequence is spread over processes of which this one holds so many tokens, where it is."""

    def spans(self, tokens: int) -> list[Span]:
        """The chunks of a sequence, or of what this process holds of it."""
        return chunk_spans(tokens, self.plan.chunk_tokens) if self.spread is None else self.spread(tokens).spans

    def new_boundary(self, layer: int, shape: torch.Size, device: torch.device) -> Boundary:
        return Boundary(self.store, self.plan, layer, shape, device, self.spans(shape[1]))

    def take_boundary(self, x: Tensor, taker: str) -> Boundary:
        """The boundary whose stand-in `x` is. Raises RuntimeError for any other tensor."""
        boundary, self.boundary = self.boundary, None
        if boundary is None or not boundary.is_behind(x):
            raise RuntimeError(
                f"{taker} was not given what came out before it: something changes the hidden states on the way; "
                'use Plan(boundaries="tensor")'
            )
        return boundary


class Segment:
    """k consecutive layers, streamed together. `forward` replaces the first one's, `pass_through` the others'."""

    def __init__(self, chain: Chain, layers: Sequence[nn.Module], indices: Sequence[int], *, first: bool, last: bool) -> None:
        self.chain, self.indices, self.first, self.last = chain, tuple(indices), first, last
        self.layers = [BareLayer(layer) for layer in layers]
        self.token_args = dict(layers[0].token_args)
        self._given: tuple[Tensor, dict[str, Any]] | None = None
        self._next = 0
        self._leave: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        if arguments.pop("mix", None) is not None:
            raise ValueError("a streamed layer mixes by its carry: call it without mix")
        if x.ndim != 3:
            raise ValueError(f"a streamed layer takes hidden states [B, T, E], found shape {list(x.shape)}")
        if not x.numel():  # nor has its stand-in a place in memory to be known by
            raise ValueError(f"a streamed layer takes at least one token, found hidden states {list(x.shape)}; leave empty batches out")
        chain = self.chain
        if not self.first and chain.unfinished is not None:
            raise chain.unfinished.skipped()
        if chain.plan.boundaries == "stream" and torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
            raise RuntimeError('anomaly detection takes the NaN of a stand-in for a fault; use Plan(boundaries="tensor") with it')
        call = Call(
            layers=self.layers,
            indices=self.indices,
            plan=chain.plan,
            store=chain.store,
            arguments=Arguments(arguments, self.token_args),
            tokens=x.shape[1],
            device=x.device,
            check_replay=chain.check_replay,
            progress=chain.progress,
            spread=None if chain.spread is None else chain.spread(x.shape[1]),
        )
        tensors = [call.arguments.leaves[i] for i in call.arguments.differentiable] + call.parameters.tensors
        into = out_of = None
        if chain.plan.boundaries == "stream":
            if self.first and (chain.boundary is None or not chain.from_ids):
                chain.from_ids = chain.to_loss = False
                into = chain.new_boundary(self.indices[0], x.shape, x.device)
                x = Enter.apply(x, into)
            else:
                into = chain.take_boundary(x, f"layer {self.indices[0]}")
            out_of = chain.new_boundary(self.indices[-1] + 1, x.shape, x.device)
            call.before, out_of.maker = into.maker, call if torch.is_grad_enabled() else None
        y = _StreamedSegment.apply(call, into, out_of, torch.is_grad_enabled(), x, *tensors)
        leaves = self.last and not chain.to_loss
        self._leave = (lambda y: chain.leave(y, out_of)) if out_of is not None and leaves else None
        chain.boundary = None if leaves else out_of
        if len(self.layers) == 1:
            return self._finished(y)
        chain.unfinished, self._given, self._next = self, (y.detach(), arguments), 1
        return y

    def pass_through(self, position: int, x: Tensor, **arguments: Any) -> Tensor:
        """A later layer of the segment: its work is done already. Raises when it is not given what the segment gave out."""
        if self._given is None or position != self._next:
            raise self.skipped()
        given, expected = self._given
        changed = x.data_ptr() != given.data_ptr() or x.shape != given.shape or version_of(x) != version_of(given)
        if changed or not same_arguments(arguments, expected):
            raise RuntimeError(
                f"layers {self.indices[0]} to {self.indices[-1]} are streamed as one segment, and a layer of it was given other hidden "
                "states or arguments than the one before; use Plan(segment_layers=1)"
            )
        self._next += 1
        return self._finished(x) if self._next == len(self.layers) else x

    def _finished(self, y: Tensor) -> Tensor:
        """What the segment's last layer gives out: only it turns the last stand-in into a tensor."""
        leave, self._leave, self._given, self.chain.unfinished = self._leave, None, None, None
        return y if leave is None else leave(y)

    def skipped(self) -> RuntimeError:
        self._given = self.chain.unfinished = None
        return RuntimeError(
            f"layers {self.indices[0]} to {self.indices[-1]} are streamed as one segment, and not all of them were called, in order; "
            "use Plan(segment_layers=1) for a model that skips layers"
        )


def is_streamed(module: nn.Module) -> bool:
    """Whether a segment's `forward` has taken the place of the module's own."""
    return _leads_to_segment(module.__dict__.get("forward"))


def _leads_to_segment(forward: Any) -> bool:
    if isinstance(forward, partial):
        return any(map(_leads_to_segment, (forward.func, *forward.args)))
    return isinstance(getattr(forward, "__self__", None), Segment)


def same_arguments(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(_same_value(a[k], b[k]) for k in a)


def _same_value(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return not (a.requires_grad or b.requires_grad) and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same_value, a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


class _StreamedSegment(torch.autograd.Function):
    """(hidden states or their stand-in, differentiable arguments, parameters) -> hidden states or their stand-in."""

    @staticmethod
    def forward(ctx, call: Call, into: Boundary | None, out_of: Boundary | None, grad: bool, x: Tensor, *tensors: Tensor) -> Tensor:
        keep = grad and any(ctx.needs_input_grad)
        source = WholeTensor(call.tokens, x) if into is None else into.value
        sink = WholeTensor(call.tokens) if out_of is None else out_of.value
        _algorithm(call).forward(call, source, sink, keep=keep)
        if keep:
            ctx.call, ctx.into, ctx.out_of = call, into, out_of
            ctx.save_for_backward(x, *tensors)
        return sink.tensor if out_of is None else out_of.stand_in

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        call, into, out_of = ctx.call, ctx.into, ctx.out_of
        if call.states is None:
            raise RuntimeError(
                "a streamed segment can be differentiated once: its stored chunks were freed by the first backward; "
                "call forward again instead of using retain_graph=True"
            )
        call.arguments.check_unchanged()
        x, *tensors = ctx.saved_tensors
        want_dx, *wanted = ctx.needs_input_grad[4:]
        replica = Replica(call, tensors, wanted)
        source = WholeTensor(call.tokens, x) if into is None else into.value
        dsink = WholeTensor(call.tokens, dy) if out_of is None else out_of.grad
        dsource = WholeTensor(call.tokens) if into is None else into.grad
        _algorithm(call).backward(call, replica, source, dsink, dsource, want_dx=want_dx)
        dx = None
        if want_dx:
            dx = dsource.tensor if into is None else into.stand_in
        return None, None, None, None, dx, *replica.gradients()


def _algorithm(call: Call):
    return causal if all(is_causal(mixer, call.plan.chunk_tokens) for mixers in call.mixers for mixer in mixers) else twopass
