"""All-Scan: a state handed along ranks that hold different tokens (ZeCO, Chou et al. 2025, arXiv:2507.01004), forward and backward.

Runs of tokens follow each other from rank to rank. In linear attention the state behind a run is an affine function of the one
before it, and so is the output; the delta rule's A is a matrix, else it is a decay for each key feature:

    S' = S0 + A S          out_t = out0_t + P_t S          dS = P^T dout + A^T dS'

S0, A, out0 and P come from the rank's own tokens. What goes from rank to rank is S, forward, and dS, backward, a few heads at a time: while
the states of some heads are on their way, a rank makes S0, A, out0 and P of the next ones, and, backward, differentiates those that it
has handed on. A rank that the states reach later is so many heads ahead with its own tokens when they do. With the state before its run and
the adjoint of the one behind it, a rank differentiates its tokens by itself. Nothing is divided out: A and P are sums of log decays,
exponentiated, and 0 behind the beginning of a document.

Fast weights (LaCT) change by more than affine functions. There a head is a block: it is read and updated, then handed on, and ranks work
on different heads at the same time.

A rank receives one state for each of its runs of tokens, forward and backward: H D Dv w bytes, whatever their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtrain.ops.state_mixers import LinearAttentionMixer
from longtrain.parallel.relay import Known, Relay, Stage
from longtrain.span import Span

BLOCKS = 8
"""In which a state of linear attention travels: so many groups of heads, or where there are fewer, parts of their value features."""


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

    def apply(self, S: Tensor, block: Block) -> Tensor:
        A = self.A[block.in_work[:2]]
        return A @ S if self.is_matrix else A * S

    def transposed(self, dS: Tensor, block: Block) -> Tensor:
        A = self.A[block.in_work[:2]]
        return A.mT @ dS if self.is_matrix else A * dS

    def read(self, S: Tensor) -> Tensor:
        """P S, ``[B, t, H, Dv]``."""
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


@dataclass(frozen=True, slots=True)
class Block:
    """What is sent at a time of a state ``[B, H, D, Dv]``: some value features of some heads. The same on all ranks."""

    heads: slice
    columns: slice
    work: slice
    """The heads that this rank works on together, these and perhaps others: as many as it has threads."""
    first: bool
    """Of those of its work that are sent."""
    last: bool

    @property
    def index(self) -> tuple[slice, ...]:
        return slice(None), self.heads, slice(None), self.columns

    @property
    def in_work(self) -> tuple[slice, ...]:
        return slice(None), slice(self.heads.start - self.work.start, self.heads.stop - self.work.start), slice(None), self.columns

    def of(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """``[B, t, H, ...]`` of the heads of its work."""
        return tuple(x[:, :, self.work] for x in tensors)


def affine_forward(relay: Relay | Known, stage: Stage, mixer, inputs: Each) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a rank's legs in a chunk, and the states before them."""
    (q, k, v, *_), wide = inputs[0], _wide(inputs[0])
    blocks, made = _blocks(v), {}
    entries = [v.new_empty(k.shape[0], *k.shape[2:], v.shape[3], dtype=wide) for _ in stage.legs]
    outs = [q.new_empty(*x[0].shape[:3], v.shape[3]) for x in inputs]

    def ready(i: int, b: int) -> None:
        if blocks[b].first:
            q, *written = x = blocks[b].of(*inputs[i])
            span = stage.legs[i].span
            made[i, blocks[b].work.start] = *mixer.step(span, None, q.to(wide), *written), Affine.of(mixer, span, x)

    def step(i: int, b: int, before: Tensor) -> Tensor:
        entries[i][blocks[b].index] = before
        _, of_zero, affine = made[i, blocks[b].work.start]
        return of_zero[blocks[b].in_work] + affine.apply(before, blocks[b])

    def done(i: int, b: int) -> None:
        if blocks[b].last:
            out, _, affine = made.pop((i, blocks[b].work.start))
            torch.add(out, affine.read(entries[i][:, blocks[b].work]), out=outs[i][:, :, blocks[b].work])

    relay.run(stage, [block.index for block in blocks], entries[0], step, ready=ready, done=done)
    return outs, entries


def affine_backward(
    relay: Relay, stage: Stage, mixer, inputs: Each, entries: Sequence[Tensor], douts: Sequence[Tensor]
) -> tuple[list[Sequence[Tensor]], list[Tensor]]:
    """Gradients of the inputs of each leg, and of the mixer's shared tensors: there are none."""
    blocks, made = _blocks(douts[0]), {}
    behind = [torch.empty_like(entry) for entry in entries]
    grads = [[torch.empty_like(x) for x in of_leg] for of_leg in inputs]

    def ready(i: int, b: int) -> None:
        if blocks[b].first:
            affine = Affine.of(mixer, stage.legs[i].span, blocks[b].of(*inputs[i]))
            made[i, blocks[b].work.start] = affine.read_vjp(*blocks[b].of(douts[i])), affine

    def step(i: int, b: int, dS: Tensor) -> Tensor:
        behind[i][blocks[b].index] = dS
        by_outputs, affine = made[i, blocks[b].work.start]
        return by_outputs[blocks[b].in_work] + affine.transposed(dS, blocks[b])

    def done(i: int, b: int) -> None:
        if blocks[b].last:
            work, span = blocks[b].work, stage.legs[i].span
            del made[i, work.start]
            dout, *x = blocks[b].of(douts[i], *inputs[i])
            found, _, _ = mixer.step_vjp(span, entries[i][:, work], x, dout, behind[i][:, work])
            for grad, part in zip(grads[i], found, strict=True):
                grad[:, :, work] = part

    relay.run(stage, [block.index for block in blocks], entries[0], step, ready=ready, done=done)
    return grads, []


def stepwise_forward(relay: Relay | Known, stage: Stage, mixer, inputs: Each) -> tuple[list[Tensor], list[Tensor]]:
    """As `affine_forward`, of a mixer whose heads are handed on one by one."""
    q, *written = inputs[0]
    heads, *shape = mixer.state_shape(*written)
    outs = [torch.empty_like(x[0]) for x in inputs]
    entries = [q.new_empty(q.shape[0], heads, *shape, dtype=_wide((*inputs[0], *mixer.shared))) for _ in stage.legs]

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


def _blocks(v: Tensor) -> list[Block]:
    """Of the state of some ``[B, t, H, Dv]``, in the order in which they are sent."""
    rows, _, heads, features = v.shape
    cut = lambda size, count: [slice(size * i // count, size * (i + 1) // count) for i in range(count)]
    groups = cut(heads, min(BLOCKS, heads))
    columns = cut(features, min(features, BLOCKS // len(groups)))
    together, work = heads if v.is_cuda else -(-torch.get_num_threads() // rows), []
    for group in groups:
        full = not work or work[-1].stop - work[-1].start >= together
        work = [*work, group] if full else [*work[:-1], slice(work[-1].start, group.stop)]
    work_of = {group.start: next(w for w in work if group.start < w.stop) for group in groups}
    return [
        Block(group, part, of, group.start == of.start and part is columns[0], group.stop == of.stop and part is columns[-1])
        for group in groups for of in [work_of[group.start]] for part in columns
    ]  # fmt: skip


def _heads(count: int) -> list[tuple[slice, slice]]:
    return [(slice(None), slice(head, head + 1)) for head in range(count)]


def _wide(tensors: Sequence[Tensor]) -> torch.dtype:
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return wide
