"""Convolution over ranks that hold different tokens, channel by channel: any filter, in two passes over the sequence.

An all-to-all brings all tokens of a rank's channels together, and back (`exchange.py`). Gates are token-local and stay where they are: what
travels is v = gate_in u, and y. With E channels of b bytes, N tokens over P ranks, a rank receives

    forward    2 E b  (N / P) (P - 1) / P            backward    3 E b  (N / P) (P - 1) / P, with an output gate 4 E b

Filter and skip are whole on every rank. Each makes their gradient for its channels; their sum over the ranks is the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longtrain.parallel.exchange import Dealt, Rounds
from longtrain.parallel.layout import Shards
from longtrain.parallel.ranks import Ranks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ConvByChannels:
    """Any convolution (`LongConvMixer`, `ButterflyMixer`) of the tokens that this rank holds, in two passes."""

    base: object
    ranks: Ranks
    shards: Shards

    causal = False
    """It needs whole sequences."""

    @property
    def shared(self) -> tuple[Tensor, ...]:
        return self.base.shared

    def with_shared(self, *shared: Tensor) -> ConvByChannels:
        return replace(self, base=self.base.with_shared(*shared))

    def by_group(self, *inputs_BTE: Tensor) -> Iterator[tuple[slice, ConvByChannels, tuple[Tensor, ...]]]:
        """All channels at once: they are cut into rounds, of which one is in flight while another is mixed."""
        yield slice(None), self, inputs_BTE

    def mix_into(self, out_BTE: Tensor, u_BTE: Tensor, gate_in_BTE: Tensor | None = None, gate_out_BTE: Tensor | None = None) -> None:
        v_BTE = u_BTE if gate_in_BTE is None else u_BTE * gate_in_BTE
        (y_BTE,) = self._through((v_BTE,), lambda _, part, v: (part(v),), ("v", "y"), 1)
        out_BTE.copy_(y_BTE if gate_out_BTE is None else y_BTE * gate_out_BTE)

    def vjp_into(self, dout_BTE: Tensor, inputs: Sequence[Tensor], dinputs: Sequence[Tensor], dshared: Sequence[Tensor]) -> None:
        """Writes the gradients of inputs and of `shared`, of these by this rank's channels."""
        u_BTE, gate_in, gate_out = (*inputs, None, None)[:3]
        v_BTE = u_BTE if gate_in is None else u_BTE * gate_in
        dy_BTE = dout_BTE if gate_out is None else dout_BTE * gate_out
        for d in dshared:
            d.zero_()

        def work(round: int, part, v: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
            dv, y = torch.empty_like(v), () if gate_out is None else (part(v),)
            if hasattr(part, "vjp_into"):
                found = [torch.empty_like(t) for t in part.shared]
                part.vjp_into(dy, (v,), (dv,), found)
            else:
                leaves = [t.detach().requires_grad_() for t in (v, *part.shared)]
                with torch.enable_grad():
                    out = part.with_shared(*leaves[1:])(leaves[0])
                dv, *found = torch.autograd.grad(out, leaves, dy)
            for d, made in zip(self._shares(dshared, round), found, strict=True):
                d += made
            return (dv, *y)

        dv_BTE, *y_BTE = self._through((v_BTE, dy_BTE), work, ("v and dy", "dv"), 1 if gate_out is None else 2)
        dinputs[0].copy_(dv_BTE if gate_in is None else dv_BTE * gate_in)
        if gate_in is not None:
            dinputs[1].copy_(dv_BTE * u_BTE)
        if gate_out is not None:
            dinputs[2].copy_(dout_BTE * y_BTE[0])

    @property
    def _dealt(self) -> Dealt:
        """Whole filters to each rank."""
        filters, channels = self.base.filter.shape[0], self.base.skip.shape[0]
        return Dealt(filters, self.ranks.size, channels // filters)

    def _shares(self, shared: Sequence[Tensor], round: int) -> list[Tensor]:
        """Of tensors like `shared`, what belongs to this rank's channels in a round; all of what is for all channels."""
        dealt = self._dealt
        channels = dealt.of(self.ranks.rank, round)
        filters = slice(channels.start // dealt.width, channels.stop // dealt.width)
        return [shared[0][filters], shared[1][channels], *shared[2:]]

    def _through(self, tensors: Sequence[Tensor], work, what: tuple[str, str], outputs: int) -> list[Tensor]:
        dealt, spans = self._dealt, tuple(self.shards.spans(rank) for rank in range(self.ranks.size))
        rounds = Rounds(self.ranks, spans, dealt.rounds)

        def of_round(round: int, *shares: Tensor) -> Sequence[Tensor]:
            with torch.no_grad():
                return work(round, self.base.with_shared(*self._shares(self.base.shared, round)), *shares)

        coming = rounds.start(what[0], [(x, dealt.of) for x in tensors])
        return rounds.finish([coming], of_round, what[1], [(dealt.of, dealt.size)] * outputs)
