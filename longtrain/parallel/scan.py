"""All-Scan: a state handed along ranks that hold different tokens (ZeCO, Chou et al. 2025, arXiv:2507.01004), forward and backward.

Runs of tokens follow each other from rank to rank. In linear attention the state behind a run is an affine function of the one
before it, and so is the output; the delta rule's A is a matrix, else it is a decay for each key feature:

    S' = S0 + A S          out_t = out0_t + P_t S          dS = P^T dout + A^T dS'

S0, A, out0 and P come from the rank's own tokens, all ranks at the same time. What goes from rank to rank is S, forward, and dS, backward:
block after block of its value features: while a rank hands one on and reads it (P S), the next is on its way to it. What comes has been
asked for before S0, A, out0 and P are made, and arrives meanwhile where the rank before is done sooner. With the state
before its run and the adjoint of the one behind it, a rank differentiates its tokens by itself. Nothing is divided out: A and P are sums
of log decays, exponentiated, and 0 behind the beginning of a document.

Fast weights (LaCT) change by more than affine functions. There a head is a block: it is read and updated, then handed on, and ranks work
on different heads at the same time.

A rank receives one state for each of its runs of tokens, forward and backward: H D Dv w bytes, whatever their length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longtrain.ops.state_mixers import LinearAttentionMixer
from longtrain.parallel.layout import Shards
from longtrain.parallel.ranks import Message, Pending, Ranks
from longtrain.span import Span

BLOCKS = 4
"""In which a state of linear attention travels, at most."""


@dataclass(frozen=True, slots=True)
class Leg:
    """A run of tokens that a rank holds of a chunk, and which ranks hold what comes before and what comes behind (None: nothing does)."""

    span: Span
    source: int | None
    target: int | None


@dataclass(frozen=True, slots=True)
class Stage:
    """What a rank has to do with the state in one chunk, in the order in which the state comes by."""

    legs: tuple[Leg, ...]
    heir_of: int | None
    """The rank that hands this one the state with which the next chunk begins; None where another rank needs it, or nobody does."""

    def split(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """The tensors of each leg, of those of a chunk, which are in the order of positions."""
        return list(zip(*(x.split([len(leg.span) for leg in self.legs], dim=1) for x in tensors), strict=True))


def stages(shards: Shards, rank: int, *, backward: bool = False) -> list[Stage]:
    """Of each chunk, for `rank`; `backward`: from the last token to the first, legs within a chunk too."""
    chain = shards.pieces[::-1] if backward else shards.pieces
    ends = (None, None, None)
    found = {chunk: ([], None) for chunk in range(len(shards.chunks))}
    for (_, before, _), (chunk, owner, span), (chunk_behind, behind, _) in zip((ends, *chain), chain, (*chain[1:], ends), strict=False):
        legs, heir_of = found[chunk]
        if owner == rank:
            legs.append(Leg(span, before, behind))
        elif behind == rank and chunk_behind != chunk:
            found[chunk] = legs, owner
    return [Stage(tuple(legs), heir_of) for legs, heir_of in found.values()]


def hand_overs(shards: Shards) -> int:
    """How often the state goes from one rank to another."""
    owners = [owner for _, owner, _ in shards.pieces]
    return sum(a != b for a, b in zip(owners, owners[1:], strict=False))


Step = Callable[[int, int, Tensor], Tensor]
Then = Callable[[int, int], None]


class Relay:
    """States, or their adjoints, on their way along the legs of one rank. All that is sent in a chunk is received in it."""

    def __init__(self, ranks: Ranks, what: str) -> None:
        self._ranks, self._what = ranks, what
        self._own: list[Tensor] = []
        """The blocks behind a leg, where the next one is this rank's too."""
        self._coming: list[list[Pending]] = []
        """Blocks from other ranks, for each leg that is given some."""

    def expect(self, stage: Stage, blocks: Sequence[Any], like: Tensor) -> None:
        """Before a chunk: have all that other ranks send in it come whenever it is sent, while this one computes or sends.

        `blocks` are indices into a state like `like`. What the chunk begins with was asked for in the one before.
        """
        sources = [leg.source for leg in stage.legs if leg.source not in (None, self._ranks.rank)]
        for source in sources[len(self._coming) :]:
            self._ask(source, blocks, like)

    def run(self, stage: Stage, blocks: Sequence[Any], like: Tensor, step: Step, then: Then = lambda leg, block: None) -> None:
        """``behind = step(leg, block, before)`` for every block of every leg, in this order; ``then(leg, block)`` when it was sent.

        At the end of the sequence, where there is nothing before, that is a state of zeros.
        """
        sent = []
        for i, leg in enumerate(stage.legs):
            own, self._own = self._own, []
            coming = self._coming.pop(0) if leg.source not in (None, self._ranks.rank) else []
            for b, block in enumerate(blocks):
                if leg.source is None:
                    before = torch.zeros_like(like[block])
                else:
                    before = own[b] if leg.source == self._ranks.rank else coming[b].wait()[self._what][0]
                behind = step(i, b, before).contiguous()
                if leg.target == self._ranks.rank:
                    self._own.append(behind)
                elif leg.target is not None:
                    sent.append(self._ranks.exchange([Message(self._what, leg.target, (behind,))], []))
                then(i, b)
        if stage.heir_of is not None:
            self._ask(stage.heir_of, blocks, like)
        for pending in sent:
            pending.wait()

    def _ask(self, source: int, blocks: Sequence[Any], like: Tensor) -> None:
        buffers = [like.new_empty(like[block].shape) for block in blocks]
        self._coming.append([self._ranks.exchange([], [Message(self._what, source, (buffer,))]) for buffer in buffers])


@dataclass(frozen=True, slots=True)
class Known:
    """In place of a relay, where the states before a rank's legs are known: the same steps on the same numbers."""

    entries: Sequence[Tensor]

    def expect(self, stage: Stage, blocks: Sequence[Any], like: Tensor) -> None:
        pass

    def run(self, stage: Stage, blocks: Sequence[Any], like: Tensor, step: Step, then: Then = lambda leg, block: None) -> None:
        for i, entry in enumerate(self.entries):
            for b, block in enumerate(blocks):
                step(i, b, entry[block])
                then(i, b)


@dataclass(frozen=True, slots=True)
class Affine:
    """Linear attention on a run of tokens as a function of the state S before it. P ``[B, t, H, D]``; A ``[B, H, D, D]``, or where it is a
    decay ``[B, H, D or 1, 1]``."""

    P: Tensor
    A: Tensor

    @classmethod
    def of(cls, mixer: LinearAttentionMixer, span: Span, inputs: Sequence[Tensor]) -> Affine:
        q, k, v, *rates = inputs
        wide = _wide(inputs)
        if mixer.delta:  # linear in values and state: with values of 0 and the unit matrix for a state, the output is P, the state A
            unit = torch.eye(k.shape[3], dtype=wide, device=k.device).expand(k.shape[0], k.shape[2], -1, -1)
            return cls(*mixer.step(span, unit, q.to(wide), k, torch.zeros_like(k), *rates))
        left = tokens_left(mixer, span)
        P = q.to(wide) * (q.shape[3] ** -0.5 if mixer.scale is None else mixer.scale)
        P[:, left:] = 0
        A = P.new_full((*k.shape[:1], k.shape[2], 1, 1), float(left == len(span)))
        if mixer.gated and left:
            decay = rates[0] if rates[0].dim() == 4 else rates[0][..., None]
            sums = decay[:, :left].to(wide).cumsum(1)
            P[:, :left] *= sums.exp()
            A = A * sums[:, -1, :, :, None].exp()
        return cls(P, A)

    def apply(self, S: Tensor) -> Tensor:
        return self.A @ S if self.is_matrix else self.A * S

    def transposed(self, dS: Tensor) -> Tensor:
        return self.A.mT @ dS if self.is_matrix else self.A * dS

    def read(self, S: Tensor) -> Tensor:
        """P S, ``[B, t, H, Dv]``, or some of its value features."""
        return torch.einsum("bthd,bhdv->bthv", self.P, S)

    def read_vjp(self, dout: Tensor) -> Tensor:
        """P^T dout, ``[B, H, D, Dv]``."""
        return torch.einsum("bthd,bthv->bhdv", self.P, dout.to(self.P.dtype))

    @property
    def is_matrix(self) -> bool:
        return self.A.shape[-1] > 1


def tokens_left(mixer, span: Span) -> int:
    """Tokens of a span that belong to the document of the token before it."""
    if mixer.documents is None:
        return len(span) if span.start else 0
    return next((min(edge, span.stop) - span.start for edge in mixer.documents.edges if edge >= span.start), len(span))


Each = Sequence[Sequence[Tensor]]
"""The inputs of each leg."""


def affine_forward(relay: Relay | Known, stage: Stage, mixer, inputs: Each) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a rank's legs in a chunk, and the states before them."""
    (q, k, v, *_), wide = inputs[0], _wide(inputs[0])
    entries = [v.new_empty(k.shape[0], *k.shape[2:], v.shape[3], dtype=wide) for _ in stage.legs]
    blocks = _columns(v.shape[3])
    relay.expect(stage, blocks, entries[0])
    outs, made = zip(*(mixer.step(leg.span, None, x[0].to(wide), *x[1:]) for leg, x in zip(stage.legs, inputs, strict=True)), strict=True)
    affine = [Affine.of(mixer, leg.span, x) for leg, x in zip(stage.legs, inputs, strict=True)]

    def step(i: int, b: int, before: Tensor) -> Tensor:
        entries[i][blocks[b]] = before
        return made[i][blocks[b]] + affine[i].apply(before)

    def then(i: int, b: int) -> None:  # while this block is on its way to the next rank, and the next one to this
        outs[i][blocks[b]].add_(affine[i].read(entries[i][blocks[b]]))

    relay.run(stage, blocks, entries[0], step, then)
    return [out.to(q.dtype) for out in outs], entries


def affine_backward(
    relay: Relay, stage: Stage, mixer, inputs: Each, entries: Sequence[Tensor], douts: Sequence[Tensor]
) -> tuple[list[Sequence[Tensor]], list[Tensor]]:
    """Gradients of the inputs of each leg, and of the mixer's shared tensors: there are none."""
    behind, blocks = [torch.empty_like(entry) for entry in entries], _columns(entries[0].shape[3])
    relay.expect(stage, blocks, behind[0])
    affine = [Affine.of(mixer, leg.span, x) for leg, x in zip(stage.legs, inputs, strict=True)]
    made = [part.read_vjp(dout) for part, dout in zip(affine, douts, strict=True)]

    def step(i: int, b: int, dS: Tensor) -> Tensor:
        behind[i][blocks[b]] = dS
        return made[i][blocks[b]] + affine[i].transposed(dS)

    relay.run(stage, blocks, entries[0], step)
    of_legs = zip(stage.legs, entries, inputs, douts, behind, strict=True)
    return [mixer.step_vjp(leg.span, entry, x, dout, dS)[0] for leg, entry, x, dout, dS in of_legs], []


def stepwise_forward(relay: Relay | Known, stage: Stage, mixer, inputs: Each) -> tuple[list[Tensor], list[Tensor]]:
    """As `affine_forward`, of a mixer whose heads are handed on one by one."""
    q, *written = inputs[0]
    heads, *shape = mixer.state_shape(*written)
    outs = [torch.empty_like(x[0]) for x in inputs]
    entries = [q.new_empty(q.shape[0], heads, *shape, dtype=_wide((*inputs[0], *mixer.shared))) for _ in stage.legs]
    relay.expect(stage, _heads(heads), entries[0])

    def step(i: int, head: int, before: Tensor) -> Tensor:
        at = slice(head, head + 1)
        entries[i][:, at] = before
        outs[i][:, :, at], behind = of_heads(mixer, at).step(stage.legs[i].span, before, *(x[:, :, at] for x in inputs[i]))
        return behind

    relay.run(stage, _heads(heads), entries[0], step)
    return outs, entries


def stepwise_backward(
    relay: Relay, stage: Stage, mixer, inputs: Each, entries: Sequence[Tensor], douts: Sequence[Tensor]
) -> tuple[list[Sequence[Tensor]], list[Tensor]]:
    """As `affine_backward`."""
    grads = [[torch.empty_like(x) for x in of_leg] for of_leg in inputs]
    dshared = [torch.zeros_like(t, dtype=_wide((t,))) for t in mixer.shared]
    relay.expect(stage, _heads(entries[0].shape[1]), entries[0])

    def step(i: int, head: int, dS: Tensor) -> Tensor:
        at = slice(head, head + 1)
        x, entry, dout = [t[:, :, at] for t in inputs[i]], entries[i][:, at], douts[i][:, :, at]
        dinputs, dentry, of_shared = of_heads(mixer, at).step_vjp(stage.legs[i].span, entry, x, dout, dS)
        for grad, found in zip(grads[i], dinputs, strict=True):
            grad[:, :, at] = found
        for whole, found in zip(dshared, of_shared, strict=True):
            whole[at] += found
        return dentry

    relay.run(stage, _heads(entries[0].shape[1]), entries[0], step)
    return grads, dshared


def of_heads(mixer, heads: slice):
    """The mixer of some heads: of its tensors of its own, theirs."""
    return mixer.with_shared(*(t[heads] for t in mixer.shared))


def _columns(features: int) -> list[Any]:
    count = min(BLOCKS, features)
    return [(..., slice(features * b // count, features * (b + 1) // count)) for b in range(count)]


def _heads(count: int) -> list[Any]:
    return [(slice(None), slice(head, head + 1)) for head in range(count)]


def _wide(tensors: Sequence[Tensor]) -> torch.dtype:
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return wide
