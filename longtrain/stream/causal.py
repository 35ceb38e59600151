"""Streaming exact backpropagation for causal layers (StreamBP, arXiv:2506.03077; here each key and value is differentiated once).

Forward, chunks in order, no graph. Backward, chunks in reverse order: replay the chunk with a graph and take its vector-Jacobian
product. When a chunk is replayed every later query has been handled, so the gradients of its keys and values are final: they enter
the replay's graph as they are, and each projection is differentiated once.

    for span in reversed(spans):
        y = layers(x[span])                          # graph of one chunk through the segment's k layers
        dx[span], dparams += vjp(y, dy[span])        # mixer node: dq = carry.mix_vjp(span, ...); dk, dv = carry.take_grad(span)

Cost, with A = attention forward and N = token-local forward of the segment, b = share of outputs stored: forward A + N; backward
2.5 A + 3 N, plus (1 - b)^2 A for one full-causal document or (1 - b) A for windows; restoring keys and values that are not stored runs the layers up to the last one's projections once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from longtrain.offload import Stored
from longtrain.span import Span
from longtrain.stream.call import Call, Enough, Replica, Sequenced, vjp
from longtrain.stream.carry import make_carry
from longtrain.stream.protocol import Carry


def forward(call: Call, x: Sequenced, y: Sequenced, *, keep: bool) -> None:
    """``y[span] = layers(x[span])`` for all spans; with `keep`, x and what else the plan stores stay for `backward`."""
    states = [[_MixerState.make(call, layer, mixer) for mixer in mixers] for layer, mixers in enumerate(call.mixers)]
    for span in call.over(call.spans, "forward"):
        hidden = x.get(span) if keep else x.take(span)
        with call.random.recorded(span):
            for layer, mixer_states in enumerate(states):
                hidden = call.run(layer, span, hidden, [partial(state.forward, span, keep=keep) for state in mixer_states])
        y.put(span, hidden)
    if keep:
        for state in (s for mixer_states in states for s in mixer_states):
            state.store_carry()
        call.states = states


def backward(call: Call, replica: Replica, x: Sequenced, dy: Sequenced, dx: Sequenced, *, want_dx: bool) -> None:
    """``dx[span]`` for all spans, last to first, and the replica's gradient sums. x and dy are released as they are used."""
    _restore(call, replica, x)
    for span in call.over(reversed(call.spans), "backward"):
        leaf = hidden = x.take(span).detach().requires_grad_(want_dx)
        with call.random.restored(span), call.surroundings.restored(), torch.enable_grad():
            for layer, states in enumerate(call.states):
                steps = [partial(state.replay, span) for state in states]
                hidden = call.run(layer, span, hidden, steps, replica)
        dleaf = vjp(hidden, dy.take(span), leaf, replica)
        if want_dx:
            dx.put(span, dleaf)
    call.states = None


def _restore(call: Call, replica: Replica, x: Sequenced) -> None:
    """Fill the carries: from the store, and where keys and values were not stored by running the layers again, without a graph."""
    states = [s for mixer_states in call.states for s in mixer_states]
    for state in states:
        state.load_carry()
    last = max((i for i, s in enumerate(states) if s.keep_written.start > 0), default=None)
    if last is None:
        return
    stop = max(state.keep_written.start for state in states)
    for span in call.over((s for s in call.spans if s.start < stop), "restore"):
        with call.random.restored(span), call.surroundings.restored():
            hidden = x.get(span)
            try:
                for layer, mixer_states in enumerate(call.states):
                    steps = [partial(s.restore, span, stop=s is states[last]) for s in mixer_states]
                    hidden = call.run(layer, span, hidden, steps, replica)
            except Enough:
                continue


@dataclass(slots=True, eq=False)
class _MixerState:
    """One mixer call of one layer: its carry, and what of it is stored between forward and backward."""

    new_carry: Callable[[], Carry]
    carry: Carry | None
    spans: list[Span]
    keep_outputs: Span
    keep_written: Span
    outputs: Stored
    lses: Stored | None = None
    written: Sequence[Stored] = ()
    restored: set[Span] = field(default_factory=set)
    """Outputs that were not kept, and that the restoring pass had to compute: in the store now as well."""
    seen: dict[Span, tuple[Tensor, ...]] | None = None
    """With `check_replay`, the mixer's inputs as the forward pass had them."""

    @classmethod
    def make(cls, call: Call, layer: int, mixer) -> _MixerState:
        new_carry, index = partial(make_carry, mixer, call.tokens), call.indices[layer]
        keep_outputs = call.plan.stored_outputs(index, call.tokens)
        return cls(
            new_carry=new_carry,
            carry=new_carry(),
            spans=call.spans,
            keep_outputs=keep_outputs,
            keep_written=call.plan.stored_kv(index, call.tokens),
            outputs=Stored(call.store, f"layer {index} attention output"),
            seen={} if call.check_replay else None,
        )

    # A span is always mixed in the parts that `keep_outputs` cuts it into, so that forward, restoring and replay run the same kernels
    # on the same rows.
    def parts(self, span: Span, q: Tensor) -> Iterator[tuple[Span, Tensor]]:
        for part in span.split(self.keep_outputs.start):
            yield part, q[:, part.slice(span.start)]

    def compare(self, span: Span, *inputs: Tensor) -> None:
        """Raise RuntimeError unless these are the forward's bits."""
        if self.seen is None:
            return
        for name, before, now in zip(("q", *self.carry.spec.tensors), self.seen[span], inputs, strict=True):
            if not torch.equal(before, now):
                raise RuntimeError(f"the replay of {span} gave other bits than the forward pass: {name} differs")

    def forward(self, span: Span, q: Tensor, *written: Tensor, keep: bool) -> Tensor:
        if self.seen is not None:
            self.seen[span] = tuple(t.clone() for t in (q, *written))
        self.carry.append(span, *written)
        outs = []
        for part, q_part in self.parts(span, q):
            out, lse = self.carry.mix(part, q_part, None)
            if keep and part.start >= self.keep_outputs.start:
                self._put_output(part, out, lse)
            outs.append(out)
        return _join(outs)

    def restore(self, span: Span, q: Tensor, *written: Tensor, stop: bool) -> Tensor:
        """Append what of a span is not stored, and give the output on to the next layer."""
        for part in span.split(self.keep_written.start):
            if part.start < self.keep_written.start:
                self.carry.append(part, *(x[:, part.slice(span.start)] for x in written))
        self.compare(span, q, *written)
        if stop:
            raise Enough
        outs = []
        for part, q_part in self.parts(span, q):
            if part.start < self.keep_outputs.start:
                self._put_output(part, *self.carry.mix(part, q_part, None))
                self.restored.add(part)
            outs.append(self.outputs.get(part))
        return _join(outs)

    def replay(self, span: Span, q: Tensor, *written: Tensor) -> Tensor:
        """The mixer as a node of the chunk's graph; outputs come from the store where they are, else from the kernel."""
        self.compare(span, q, *written)
        outs, lses = [], []
        with torch.no_grad():
            for part, q_part in self.parts(span, q):
                in_store = part.start >= self.keep_outputs.start or part in self.restored
                stored = self._take_output(part) if in_store else None
                out, lse = self.carry.mix(part, q_part, stored)
                outs.append(out)
                lses.append(lse)
            out, lse = _join(outs), None if lses[0] is None else _join(lses)
        return _MixNode.apply(self.carry, span, out, lse, q, *written)

    def store_carry(self) -> None:
        """After the forward pass: put the kept range of what was appended into the store, and let the carry go."""
        if self.carry.spec.kind != "append":  # a state is rebuilt in order, from the first token on
            self.keep_written = Span(self.keep_written.stop, self.keep_written.stop)
        for span in self._written_extents():
            tensors = self.carry.written(span)
            self.written = self.written or [Stored(self.outputs.store, name) for name in self.carry.spec.tensors]
            for stored, tensor in zip(self.written, tensors, strict=True):
                # a part is copied out, so that the rest of the buffer can go
                stored.put(span, tensor if self.keep_written.start == 0 else tensor.clone())
        self.carry = None

    def load_carry(self) -> None:
        """Before the backward pass: a fresh carry with the kept range taken back from the store."""
        self.carry = self.new_carry()
        for span in self._written_extents():
            self.carry.append(span, *(stored.take(span) for stored in self.written))

    def _written_extents(self) -> list[Span]:
        if self.keep_written.start == 0:
            return [self.keep_written]
        return [part for span in self.spans if len(part := span & self.keep_written)]

    def _put_output(self, span: Span, out: Tensor, lse: Tensor | None) -> None:
        self.outputs.put(span, out)
        if lse is not None:
            self.lses = self.lses or Stored(self.outputs.store, "LSE")
            self.lses.put(span, lse)

    def _take_output(self, span: Span) -> tuple[Tensor, Tensor | None]:
        return self.outputs.take(span), None if self.lses is None else self.lses.take(span)


class _MixNode(torch.autograd.Function):
    """A span's mixer in the graph of its replay: (q, k, v) -> out, differentiated by the carry."""

    @staticmethod
    def forward(ctx, carry: Carry, span: Span, out: Tensor, lse: Tensor | None, q: Tensor, *written: Tensor) -> Tensor:
        ctx.carry, ctx.span, ctx.lse = carry, span, lse
        ctx.save_for_backward(q, out)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, dout: Tensor):
        q, out = ctx.saved_tensors
        dq = ctx.carry.mix_vjp(ctx.span, q, out, ctx.lse, dout)
        return None, None, None, None, dq, *ctx.carry.take_grad(ctx.span)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
