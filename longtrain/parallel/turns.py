"""Layers that keep states of their own (a transformers layer's convolution and recurrence, through its cache) over ranks that hold
different tokens.

What a state is and how it changes, only the layer knows, and so ranks take turns. A rank runs the layer on a run of tokens when it has the
states behind the tokens before, and hands on those behind its own; in the backward pass it hands back their gradients:

    y, state' = layer(x[run], state)          dx[run], dparams, dstate = vjp(dy[run], dstate')

A replay begins with the states that the forward pass kept, on all ranks at the same time; only derivatives are taken in turns. Where a
forward pass takes F and its derivative 2 F, of which nothing is done at the same time, the 4 F / P that is a rank's part takes 3 F: a rank
waits for 1 - 4 / (3 P) of it, where a sequence goes in several chunks. In one chunk a rank that has had its turn goes on to the next layer
while others have theirs, and only those that a layer with attention, or the loss, holds up wait.

A rank receives all states once for each of its runs of tokens, forward, and their gradients, backward, whatever the runs' length.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrain.parallel.layout import Shards
from longtrain.parallel.ranks import Ranks
from longtrain.parallel.relay import Relay, stages
from longtrain.span import Span
from longtrain.stream.replay import Arguments, GradientSums

States = Mapping[Hashable, Tensor]
OnStates = Callable[[Tensor, dict, States], tuple[Tensor, States]]
"""``layer(x, arguments, states before)`` -> its output, and the states behind; there are none before the first token."""

WHOLE = [slice(None)]


class Turns:
    """One call of one layer: its states on their way along the ranks, forward, and their gradients back."""

    def __init__(self, ranks: Ranks, shards: Shards, like: States, *, keep: bool) -> None:
        """`like`: tensors like the states. `keep`: whether there is a backward pass."""
        self._like, self._keep = like, keep
        self._message = self.packed(like)
        self._chunk_of = {span.stop: i for i, span in enumerate(shards.local_chunks(ranks.rank))}
        self._stages, self._stages_back = (stages(shards, ranks.rank, backward=way_back) for way_back in (False, True))
        self._there, self._back = Relay(ranks, "states"), Relay(ranks, "dstates")
        self._kept: dict[int, list[States]] = {}
        """Before each run of tokens, chunk by chunk."""

    def run(self, span: Span, x: Tensor, arguments: Arguments, parameters: Sequence[Tensor], layer: OnStates) -> Tensor:
        """The layer on the tokens that this rank holds of a chunk; with gradients it is a replay, of which each `layer` call has
        `parameters`."""
        chunk = self._chunk_of[span.stop]
        if torch.is_grad_enabled():
            differentiable = [arguments.leaves[i] for i in arguments.differentiable]
            return _Replay.apply(self, chunk, arguments, layer, x, *differentiable, *parameters)
        stage, places = self._stages[chunk], self.places(chunk)
        kept, outs = [], []

        def step(i: int, _: int, came: Tensor) -> Tensor:
            kept.append({} if stage.legs[i].source is None else self.unpacked(came))
            out, behind = layer(x[:, places[i].slice()], arguments.on(places[i]), kept[i])
            outs.append(out)
            return self.packed(behind)

        self._there.run(stage, WHOLE, self._message, step)
        if self._keep:
            self._kept[chunk] = kept
        return torch.cat(outs, dim=1)

    def places(self, chunk: int) -> list[Span]:
        """Where each run of tokens stands among those that this rank holds of a chunk."""
        found, at = [], 0
        for leg in self._stages[chunk].legs:
            found.append(Span(at, at + len(leg.span)))
            at = found[-1].stop
        return found

    def take_kept(self, chunk: int) -> list[States]:
        return self._kept.pop(chunk)

    def run_back(self, chunk: int, step: Callable[[States], States]) -> None:
        """``gradients of the states before = step(of those behind)``, for each run of tokens, the last one first."""
        relay_step = lambda i, _, came: self.packed(step(self.unpacked(came)))
        self._back.run(self._stages_back[chunk], WHOLE, self._message, relay_step)

    def packed(self, states: States) -> Tensor:
        """All of them as one message, byte by byte. Raises ValueError where they are not like those that other ranks expect."""
        of = lambda states: {key: (list(t.shape), t.dtype) for key, t in states.items()}
        if of(states) != of(self._like):
            raise ValueError(f"the layer's states changed their shape, from {of(self._like)} to {of(states)}: they cannot be handed on")
        return torch.cat([states[key].detach().contiguous().view(-1).view(torch.uint8) for key in self._like])

    def unpacked(self, message: Tensor) -> States:
        parts = message.split([t.nbytes for t in self._like.values()])
        return {key: part.clone().view(t.dtype).view(t.shape) for part, (key, t) in zip(parts, self._like.items(), strict=True)}


class _Replay(torch.autograd.Function):
    """(x, differentiable arguments, parameters) -> the layer's output for a chunk; what is between is differentiated when it is the rank's
    turn."""

    @staticmethod
    def forward(ctx, turns: Turns, chunk: int, arguments: Arguments, layer: OnStates, x: Tensor, *leaves: Tensor) -> Tensor:
        given, count = list(arguments.leaves), len(arguments.differentiable)
        for i in arguments.differentiable:  # what they are made of is differentiated behind this node, by all at once
            given[i] = given[i].detach().requires_grad_()
        ctx.turns, ctx.chunk, ctx.runs = turns, chunk, []
        ctx.leaves = (*(given[i] for i in arguments.differentiable), *leaves[count:])
        for place, kept in zip(turns.places(chunk), turns.take_kept(chunk), strict=True):
            part = x[:, place.slice()].detach().requires_grad_(x.requires_grad)
            before = {key: state.detach().requires_grad_() for key, state in kept.items()}
            with torch.enable_grad():
                ctx.runs.append((place, part, before, *layer(part, arguments.on(place, given), before)))
        return torch.cat([out.detach() for _, _, _, out, _ in ctx.runs], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        dx = torch.empty_like(dy) if ctx.needs_input_grad[4] else None
        wanted = [(i, leaf) for i, leaf in enumerate(ctx.leaves) if leaf.requires_grad]
        sums = GradientSums(len(ctx.leaves))

        def step(dbehind: dict[Hashable, Tensor]) -> States:
            place, part, before, out, behind = ctx.runs.pop()
            made = [(out, dy[:, place.slice()]), *((state, dbehind[key]) for key, state in behind.items())]
            outs, douts = zip(*((t, dt) for t, dt in made if t.requires_grad), strict=True)
            inputs = [*([] if dx is None else [part]), *before.values(), *(leaf for _, leaf in wanted)]
            found = iter(torch.autograd.grad(outs, inputs, douts, allow_unused=True))
            if dx is not None:
                dpart = next(found)
                dx[:, place.slice()] = 0 if dpart is None else dpart
            dbefore = {key: next(found) for key in before}
            for (i, _), grad in zip(wanted, found, strict=True):
                sums.add(i, grad)
            return {key: torch.zeros_like(like) if dbefore.get(key) is None else dbefore[key] for key, like in behind.items()}

        ctx.turns.run_back(ctx.chunk, step)
        return None, None, None, None, dx, *sums.totals
