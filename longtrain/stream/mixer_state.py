"""One mixer call of one streamed layer: its carry, and what of it the token store keeps between forward and backward."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from longtrain.offload import Stored
from longtrain.span import Span, whole_chunks
from longtrain.stream.call import Call, Enough
from longtrain.stream.carry import make_carry
from longtrain.stream.kv_blocks import in_blocks
from longtrain.stream.protocol import Carry

Need = tuple[Stored, Span]


@dataclass(slots=True, eq=False)
class MixerState:
    """In the forward pass `forward` is the mixer; in the backward pass first `restore`, where keys and values were not all kept, then
    `replay`. What is kept by the plan is the last part of the outputs (`keep_outputs`) and of what the carry was given (`keep_written`).
    """

    mixer: Any
    new_carry: Callable[[], Carry]
    carry: Carry | None
    spans: list[Span]
    keep_outputs: Span
    keep_written: Span
    outputs: Stored
    lses: Stored
    """Empty where the mixer has no LSE."""
    new_written: Callable[[str], Stored]
    hand_over: bool
    """Everything written stays on the device, so the carry's own buffers go into the store, whole and without a copy."""
    keeps: bool
    """The carry has what it was given in the store, and is the same one in the backward pass (`kv_blocks.py`)."""
    entries: Stored
    """The state before each span, of a carry that resumes, under the number of the span."""
    resumes: bool
    """The carry is a state: entry states are kept, nothing that it was given; outputs are kept for whole spans."""
    slides: bool
    """The carry holds a stretch of the sequence; in the backward pass everything written comes from the store, chunk by chunk."""
    written: Sequence[Stored] = ()
    has_lse: bool = True
    restored: set[Span] = field(default_factory=set)
    """Outputs that were not kept, and that the restoring pass had to compute: in the store now as well."""
    seen: dict[Span, tuple[Tensor, ...]] | None = None
    """With `check_replay`, the mixer's inputs as the forward pass had them."""

    @classmethod
    def make(cls, call: Call, layer: int, mixer) -> MixerState:
        # Nothing here may hold the call: it holds the state, and extents in a cycle would outlive a step that failed.
        index, plan, tokens, store, spans = call.indices[layer], call.plan, call.tokens, call.store, call.spans
        new_carry = partial(make_carry, mixer, spans)
        carry, keep_written = new_carry(), call.kept("kv", layer)
        slides, resumes = getattr(carry, "slides", False), getattr(carry, "resumes", False)
        place_kv, place_outputs = plan.place("kv", index, tokens), plan.place("outputs", index, tokens)
        place_lse = None if place_outputs is None else (lambda span: replace(place_outputs(span), compress=False))
        place_entry = None if place_kv is None else (lambda number: replace(place_kv(spans[number.start]), compress=False))
        keep_outputs = call.kept("outputs", layer)
        if resumes:
            keep_written = Span(0, tokens)
            keep_outputs = whole_chunks(keep_outputs, plan.chunk_tokens) if call.spread is None else keep_outputs

        def stored(name: str, tokens: int, *, sums: bool = False) -> Stored:
            place = plan.place("kv", index, tokens)
            return Stored(store, f"layer {index} {name}", (lambda span: replace(place(span), compress=False)) if sums and place else place)

        carry = in_blocks(carry, plan.kv_block_tokens and plan.kv_block_tokens // plan.chunk_tokens, stored)
        if keeps := getattr(carry, "keeps", False):
            keep_written = Span(0, tokens)
        return cls(
            mixer=mixer,
            new_carry=new_carry,
            carry=carry,
            spans=spans,
            keep_outputs=keep_outputs,
            keep_written=keep_written,
            outputs=Stored(store, f"layer {index} mixer output", place_outputs),
            lses=Stored(store, f"layer {index} LSE", place_lse),
            new_written=partial(stored, tokens=tokens),
            hand_over=keeps or (
                keep_written.start == 0 and not slides and not resumes and place_kv is None and getattr(carry, "hands_over", True)
            ),
            keeps=keeps,
            entries=Stored(store, f"layer {index} state", place_entry),
            resumes=resumes,
            slides=slides,
            seen={} if call.check_replay else None,
        )

    def step(self, run: Callable[..., Tensor], *args, **settings) -> Callable[..., Tensor]:
        """What the layer calls as `mix`: one of the methods below, inside of what of the mixer is token-local."""
        run, carried = partial(run, *args, **settings), getattr(self.mixer, "carried", None)
        return run if carried is None else partial(carried, run)

    def forward(self, span: Span, q: Tensor, *written: Tensor, keep: bool) -> Tensor:
        if self.seen is not None:
            self.seen[span] = tuple(t.clone() for t in (q, *written))
        self._append(span, written)
        if keep and not self.resumes and not self.hand_over:
            self._put_written(span & self.keep_written, span, written)
        outs = []
        for part, q_part in self._parts(span, q):
            out, lse = self.carry.mix(part, q_part, None)
            if keep and part.start >= self.keep_outputs.start:
                self._put_output(part, out, lse)
            outs.append(out)
        if keep and self.resumes and self.carry.entry is not None:
            self.entries.put(self._number(span), self.carry.entry[:, None])
        return _join(outs)

    def store_carry(self) -> None:
        """After the forward pass: let the carry go."""
        if self.keeps:
            return
        if self.hand_over:
            whole = Span(0, self.keep_written.stop)
            self._put_written(whole, whole, self.carry.written(whole))
        self.carry = None

    def open_carry(self) -> None:
        """Before the backward pass: a fresh carry."""
        if self.keeps:
            return
        self.carry = self.new_carry()
        if self.hand_over:
            self.carry.append(self.keep_written, *self._take_written(self.keep_written))

    def restore(self, span: Span, q: Tensor, *written: Tensor, stop: bool) -> Tensor:
        """Append a span again, and give the output on to the next layer."""
        if self.resumes:
            self._resume(span, written, self.entries.get)
        elif self.slides:
            self._append(span, written)
            self._put_written(span & Span(0, self.keep_written.start), span, written)
        elif not self.hand_over:
            for part in span.split(self.keep_written.start):
                kept = part.start >= self.keep_written.start
                self.carry.append(part, *(self._take_written(part) if kept else _cut(written, part, span)))
        self._compare(span, q, *written)
        if stop:
            raise Enough
        outs = []
        for part, q_part in self._parts(span, q):
            if part.start < self.keep_outputs.start:
                self._put_output(part, *self.carry.mix(part, q_part, None))
                self.restored.add(part)
            outs.append(self.outputs.get(part))
        return _join(outs)

    def close_restoring(self, others: Sequence[Span]) -> None:
        """After the spans that had to be restored: take the `others` from the store, unless the carry slides and asks for them later."""
        if self.slides:
            self.carry = self.new_carry()
        elif not self.hand_over and not self.resumes:
            for span in others:
                self.carry.append(span, *self._take_written(span))

    def replay(self, span: Span, q: Tensor, *written: Tensor) -> Tensor:
        """The mixer as a node of the chunk's graph; outputs come from the store where they are, else from the kernel."""
        for extent in self._extents_for(span):
            self.carry.prepend(extent, *self._take_written(extent), queries=span)
        if self.resumes:
            self._resume(span, written, self.entries.take)
        self._compare(span, q, *written)
        outs, lses = [], []
        with torch.no_grad():
            for part, q_part in self._parts(span, q):
                stored = self._take_output(part) if self._is_stored(part) else None
                out, lse = self.carry.mix(part, q_part, stored)
                outs.append(out)
                lses.append(lse)
            out, lse = _join(outs), None if lses[0] is None else _join(lses)
        return _MixNode.apply(self.carry, span, out, lse, q, *written)

    def needs_to_restore(self, span: Span) -> Iterator[Need]:
        """What `restore` will take from the store for a span."""
        if self.resumes:
            yield self.entries, self._number(span)
        elif not self.slides and not self.hand_over and len(part := span & self.keep_written):
            yield from ((stored, part) for stored in self.written)

    def needs(self, span: Span) -> Iterator[Need]:
        """What `replay` will take from the store for a span."""
        yield from ((stored, extent) for extent in self._extents_for(span) for stored in self.written)
        if self.resumes:
            yield self.entries, self._number(span)
        yield from self.needs_of_outputs(span)

    def needs_of_outputs(self, span: Span) -> Iterator[Need]:
        for part in span.split(self.keep_outputs.start):
            if self._is_stored(part):
                yield self.outputs, part
                yield self.lses, part

    # A span is always mixed in the parts that `keep_outputs` cuts it into, so that forward, restoring and replay run the same kernels
    # on the same rows.
    def _parts(self, span: Span, q: Tensor) -> Iterator[tuple[Span, Tensor]]:
        for part in span.split(self.keep_outputs.start):
            yield part, q[:, part.slice(span.start)]

    def _extents_for(self, span: Span) -> list[Span]:
        """What a carry that slides must be given for the replay of `span`, and was not given for the one after it; the last first."""
        if not self.slides:
            return []
        spans, first_needed, start = self.spans, self.carry.first_needed, attrgetter("start")
        following = bisect_left(spans, span.stop, key=start)
        stop = first_needed(spans[following]) if following < len(spans) else span.stop
        wanted = spans[bisect_left(spans, first_needed(span), key=start) : bisect_left(spans, stop, key=start)]
        return [part for s in reversed(wanted) for part in reversed(s.split(self.keep_written.start))]

    def _is_stored(self, part: Span) -> bool:
        return part.start >= self.keep_outputs.start or part in self.restored

    def _compare(self, span: Span, *inputs: Tensor) -> None:
        """Raise RuntimeError unless these are the forward's bits."""
        if self.seen is None:
            return
        for name, before, now in zip(("q", *self.carry.spec.tensors), self.seen[span], inputs, strict=True):
            if not torch.equal(before, now):
                raise RuntimeError(f"the replay of {span} gave other bits than the forward pass: {name} differs")

    def _append(self, span: Span, written: Sequence[Tensor]) -> None:
        self.carry.append(span, *written)
        if self.carry.spec.kind != "append" and not self.resumes:  # a state is rebuilt in order, from the first token on
            self.keep_written, self.hand_over = Span(self.keep_written.stop, self.keep_written.stop), False

    def _number(self, span: Span) -> Span:
        """What the entry state of `span` is stored under: one token for each span."""
        number = bisect_left(self.spans, span.start, key=attrgetter("start"))
        return Span(number, number + 1)

    def _resume(self, span: Span, written: Sequence[Tensor], fetch: Callable[[Span], Tensor]) -> None:
        begins = span.start == 0 and getattr(self.carry, "begins_empty", True)
        self.carry.resume(span, None if begins else fetch(self._number(span))[:, 0], *written)

    def _put_written(self, part: Span, span: Span, written: Sequence[Tensor]) -> None:
        """Keep `part` of what a span was written."""
        if not len(part):
            return
        self.written = self.written or [self.new_written(name) for name in self.carry.spec.tensors]
        for stored, tensor in zip(self.written, written, strict=True):
            tensor = tensor[:, part.slice(span.start)]
            stored.put(part, tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone())

    def _take_written(self, part: Span) -> list[Tensor]:
        return [stored.take(part) for stored in self.written]

    def _put_output(self, part: Span, out: Tensor, lse: Tensor | None) -> None:
        self.outputs.put(part, out)
        self.has_lse = lse is not None
        if self.has_lse:
            self.lses.put(part, lse)

    def _take_output(self, part: Span) -> tuple[Tensor, Tensor | None]:
        return self.outputs.take(part), self.lses.take(part) if self.has_lse else None


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


def _cut(tensors: Sequence[Tensor], part: Span, span: Span) -> list[Tensor]:
    return [tensor[:, part.slice(span.start)] for tensor in tensors]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
