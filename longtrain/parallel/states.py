"""The carries of mixers with a state of fixed size (linear attention, test-time training) over ranks that hold different tokens of a chunk.

    heads   an all-to-all brings all tokens of the chunk to the ranks, each with its heads, and back (`exchange.py`)
    scan    tokens stay, the state goes from rank to rank (`scan.py`)

or heads inside of groups of ranks, and the state from group to group. Where all of P ranks exchange heads, with N tokens of I bytes of
inputs and V of outputs, a rank receives:

    forward    (I + V) (N / P) (P - 1) / P          backward    (2 I + V) (N / P) (P - 1) / P
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longtrain.ops.state_mixers import LaCTMixer, LinearAttentionMixer
from longtrain.parallel.exchange import Arrived, Dealt, Rounds
from longtrain.parallel.layout import Shards
from longtrain.parallel.mesh import Mesh
from longtrain.parallel.ranks import Ranks
from longtrain.parallel.relay import Known, Relay, stages
from longtrain.parallel.scan import affine_backward, affine_forward, of_heads, stepwise_backward, stepwise_forward
from longtrain.span import Span
from longtrain.stream.protocol import CarrySpec, KVBlock
from longtrain.stream.state_carry import StateCarry, state_spec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StatesOverRanks:
    """A mixer with a state, of the tokens that this rank holds; `base` is in positions of the whole sequence."""

    base: LinearAttentionMixer | LaCTMixer
    mesh: Mesh
    """Ranks that exchange heads, and groups of them from one to the next of which states go."""
    shards: Shards
    heads: int

    causal = True

    def make_carry(self, spans: Sequence[Span]) -> ScanCarry | StatesByHeads:
        mesh = self.mesh
        if mesh.heads.size == 1:
            return ScanCarry(self.base, mesh.ring, self.shards)
        return StatesByHeads(self.base, mesh, self.shards, self.heads)

    @property
    def shared(self) -> tuple[Tensor, ...]:
        return self.base.shared

    def with_shared(self, *shared: Tensor) -> StatesOverRanks:
        return replace(self, base=self.base.with_shared(*shared))

    # In a layer with a mixer that needs two passes over the sequence, it goes along all chunks in each of them.

    def by_group(self, *inputs: Tensor) -> Iterator[tuple[slice, StatesOverRanks, tuple[Tensor, ...]]]:
        """All heads at once."""
        yield slice(None), self, inputs

    def mix_into(self, out: Tensor, *inputs: Tensor) -> None:
        for _, _, _ in self._mixed(inputs, out):
            pass

    def vjp_into(self, dout: Tensor, inputs: Sequence[Tensor], dinputs: Sequence[Tensor], dshared: Sequence[Tensor]) -> None:
        """Writes the gradients of inputs and of `shared`."""
        mixed = list(self._mixed(inputs, torch.empty_like(dout)))
        for carry, span, entry in reversed(mixed):
            q, *written = (x[:, span.slice()] for x in inputs)
            carry.resume(span, entry, *written)
            dq = carry.mix_vjp(span, q, None, None, dout[:, span.slice()])
            for whole, part in zip(dinputs, (dq, *carry.take_grad(span)), strict=True):
                whole[:, span.slice()] = part
        for whole, part in zip(dshared, carry.shared_grads(), strict=True):
            whole.copy_(part)

    def _mixed(self, inputs: Sequence[Tensor], out: Tensor) -> Iterator[tuple[ScanCarry | StatesByHeads, Span, Tensor | None]]:
        """Writes the output chunk by chunk, and gives the states before them."""
        spans = self.shards.local_chunks(self.mesh.all.rank)
        carry = self.make_carry(spans)
        for span in spans:
            q, *written = (x[:, span.slice()] for x in inputs)
            carry.append(span, *written)
            out[:, span.slice()] = carry.mix(span, q, None)[0]
            yield carry, span, carry.entry


class ScanCarry(StateCarry):
    """Where a chunk's tokens are with several ranks: `entry` is the state before each run of them that this rank holds,
    ``[B, heads, runs, ...]``, and known when the chunk was mixed."""

    begins_empty = False

    def __init__(self, mixer: LinearAttentionMixer | LaCTMixer, ranks: Ranks, shards: Shards) -> None:
        super().__init__(mixer, spans := shards.local_chunks(ranks.rank))
        self.states = shards.runs
        self._chunk_of = {span.stop: i for i, span in enumerate(spans)}
        self._stages, self._stages_back = (stages(shards, ranks.rank, backward=way_back) for way_back in (False, True))
        self._there, self._back = Relay(ranks, "state"), Relay(ranks, "dstate")
        affine = isinstance(mixer, LinearAttentionMixer)
        self._forward, self._backward = (affine_forward, affine_backward) if affine else (stepwise_forward, stepwise_backward)

    def mix(self, span: Span, q: Tensor, stored: tuple[Tensor, None] | None) -> tuple[Tensor, None]:
        if stored is not None:
            return stored
        stage = self._stages[self._chunk_of[span.stop]]
        inputs = stage.split(q, *self._written)
        relay = self._there if self.entry is None else Known(self.entry.unbind(2))
        with torch.no_grad():
            outs, entries = self._forward(relay, stage, self.mixer, inputs)
        self.entry = torch.stack(entries, dim=2)
        return _joined(outs), None

    def mix_vjp(self, span: Span, q: Tensor, out: Tensor, lse: None, dout: Tensor) -> Tensor:
        chunk = self._chunk_of[span.stop]
        *inputs, douts = zip(*self._stages[chunk].split(q, *self._written, dout), strict=True)
        inputs = list(zip(*inputs, strict=True))[::-1]
        with torch.no_grad():
            grads, dshared = self._backward(
                self._back, self._stages_back[chunk], self.mixer, inputs, self.entry.unbind(2)[::-1], douts[::-1]
            )
        for total, part in zip(self._dshared, dshared, strict=True):
            total += part
        dq, *self._dwritten = map(_joined, zip(*grads[::-1], strict=True))
        return dq


class StatesByHeads:
    """States of this rank's heads, round by round of them: one carry each, which has all tokens of the group."""

    resumes = True

    def __init__(self, mixer: LinearAttentionMixer | LaCTMixer, mesh: Mesh, shards: Shards, heads: int) -> None:
        self.mixer, self._ranks = mixer, mesh.heads
        first = mesh.ring.rank * mesh.heads.size
        self._held = tuple(part[first : first + mesh.heads.size] for part in shards.parts)
        self._chunk_of = {span.stop: i for i, span in enumerate(shards.local_chunks(first + mesh.heads.rank))}
        self._dealt = Dealt(heads, mesh.heads.size)
        grouped = shards.grouped(mesh.heads.size)
        self._inner_spans = grouped.local_chunks(mesh.ring.rank)
        self._mine = [self._dealt.of(mesh.heads.rank, r) for r in range(self._dealt.rounds)]
        parts = [of_heads(mixer, at) for at in self._mine]
        alone = mesh.ring.size == 1
        self._inner = [StateCarry(p, self._inner_spans) if alone else ScanCarry(p, mesh.ring, grouped) for p in parts]
        self._entry: Tensor | None = None
        self._resumed = False
        self._written: tuple[Tensor, ...] = ()
        self._dwritten: Sequence[Tensor] = ()
        self._ahead: tuple[Span, list[Arrived]] | None = None
        """Inputs that left when their chunk was replayed."""

    @property
    def begins_empty(self) -> bool:
        return getattr(self._inner[0], "begins_empty", True)

    @property
    def entry(self) -> Tensor | None:
        """The state before the chunk, of this rank's heads."""
        entries = [inner.entry for inner in self._inner]
        return None if entries[0] is None else torch.cat(entries, dim=1)

    @property
    def spec(self) -> CarrySpec:
        return state_spec(self.mixer, self._written, 1)

    def append(self, span: Span, *written: Tensor) -> None:
        self._resumed, self._written = False, tuple(t.detach() for t in written)

    def resume(self, span: Span, entry: Tensor | None, *written: Tensor) -> None:
        self._resumed, self._entry, self._written = True, entry, tuple(t.detach() for t in written)

    def mix(self, span: Span, q: Tensor, stored: tuple[Tensor, None] | None) -> tuple[Tensor, None]:
        coming = self._start(span, "qkv", (q, *self._written))
        if stored is not None:
            self._ahead = span, coming
            return stored

        def work(round: int, q: Tensor, *written: Tensor) -> tuple[Tensor]:
            self._give(round, span, written)
            return (self._inner[round].mix(self._at(span), q, None)[0],)

        (out,) = self._finish(span, [coming], work, "out", 1)
        return out, None

    def mix_vjp(self, span: Span, q: Tensor, out: Tensor, lse: None, dout: Tensor) -> Tensor:
        def work(round: int, dout: Tensor, q: Tensor, *written: Tensor) -> tuple[Tensor, ...]:
            self._give(round, span, written)
            dq = self._inner[round].mix_vjp(self._at(span), q, None, None, dout)
            return dq, *self._inner[round].take_grad(self._at(span))

        (of, inputs), self._ahead = self._ahead or (None, []), None
        if of != span:
            inputs = self._start(span, "qkv", (q, *self._written))
        coming = [self._start(span, "dout", (dout,)), inputs]
        dq, *self._dwritten = self._finish(span, coming, work, "dqkv", 1 + len(self._written))
        return dq

    def take_grad(self, span: Span) -> tuple[Tensor, ...]:
        taken, self._dwritten = tuple(self._dwritten), ()
        self._entry, self._written = None, ()
        return taken

    def shared_grads(self) -> list[Tensor]:
        """Gradients of the mixer's `shared` tensors by this rank's heads, once every span has had its turn."""
        whole = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in self.mixer.shared]
        for inner, at in zip(self._inner, self._mine, strict=True):
            for total, part in zip(whole, inner.shared_grads(), strict=True):
                total[at] = part
        return whole

    def blocks(self, span: Span) -> list[KVBlock]:
        return []

    def _give(self, round: int, span: Span, written: Sequence[Tensor]) -> None:
        inner, at = self._inner[round], self._at(span)
        if not self._resumed:
            inner.append(at, *written)
            return
        first, of_round = self._mine[0].start, self._mine[round]
        entry = None if self._entry is None else self._entry[:, of_round.start - first : of_round.stop - first]
        inner.resume(at, entry, *written)

    def _at(self, span: Span) -> Span:
        return self._inner_spans[self._chunk_of[span.stop]]

    def _rounds(self, span: Span) -> Rounds:
        return Rounds(self._ranks, self._held[self._chunk_of[span.stop]], self._dealt.rounds)

    def _start(self, span: Span, what: str, tensors: Sequence[Tensor]) -> list[Arrived]:
        return self._rounds(span).start(what, [(x, self._dealt.of) for x in tensors])

    def _finish(self, span: Span, coming: Sequence[list[Arrived]], work, what: str, outputs: int) -> list[Tensor]:
        return self._rounds(span).finish(coming, work, what, [(self._dealt.of, self._dealt.size)] * outputs)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
