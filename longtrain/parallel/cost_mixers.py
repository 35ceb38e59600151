"""Bytes that a rank receives for one layer that is not attention, each way, and which way is cheapest; means over ranks, for one row of the
batch and one document. The modules that do it (`conv_halo.py`, `conv_channels.py`, `states.py`, `scan.py`, `turns.py`)
derive the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from longtrain.parallel.cost import NOTHING, Choice, Received
from longtrain.parallel.layout import Shards
from longtrain.parallel.relay import hand_overs


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvShape:
    """What of a convolution decides its traffic."""

    channels: int
    filters: int
    taps: int
    itemsize: int
    causal: bool
    gate_out: bool

    def received(self, way: str, shards: Shards) -> Received:
        ranks, a_token = shards.ranks, self.channels * self.itemsize
        if way == "halo":
            tokens = hand_overs(shards) / ranks * min(self.taps - 1, shards.tokens)
            return Received(forward=tokens * a_token, backward=tokens * (a_token + self.channels * max(4, self.itemsize)))
        away = shards.tokens / ranks * (ranks - 1) / ranks * a_token
        return Received(forward=2 * away, backward=(3 + self.gate_out) * away)

    def choose(self, shards: Shards, *, segment_layers: int, two_passes: bool, way: str) -> Choice:
        """`two_passes`: whether another mixer of the layer needs them. Raises ValueError where what is asked for cannot be."""
        refused = {}
        if not self.causal:
            refused["halo"] = "its filter sees what comes after a chunk"
        elif two_passes:
            refused["halo"] = "it goes chunk by chunk, and another mixer of the layer needs two passes over the sequence"
        if self.filters < shards.ranks:
            refused["channels"] = f"its {self.filters} filters cannot be dealt to {shards.ranks} ranks"
        elif segment_layers > 1:
            refused["channels"] = "it needs two passes over the sequence, and segments of several layers are streamed chunk by chunk"
        costs = {name: self.received(name, shards) for name in ("halo", "channels") if name not in refused}
        return cheapest("conv", way, costs, refused)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateShape:
    """What of a mixer with a state decides its traffic."""

    heads: int
    inputs: int
    """Bytes of a token's inputs."""
    outputs: int
    state: int
    """Bytes of the state."""
    affine: bool
    """Whether the state before a chunk changes that behind it by an affine function, so that ranks need not wait for each other."""
    causal = True

    def received(self, way: str, shards: Shards, *, heads: int) -> Received:
        """`heads`: ranks that exchange heads, where that is the way, in groups from one to the next of which the states go."""
        if way == "scan":
            handed = hand_overs(shards) / shards.ranks * self.state
            return Received(forward=handed, backward=handed)
        away = shards.tokens / shards.ranks * (heads - 1) / heads
        grouped = shards.grouped(heads)
        handed = hand_overs(grouped) / grouped.ranks * self.state / heads
        of_heads = Received(forward=away * (self.inputs + self.outputs), backward=away * (2 * self.inputs + self.outputs))
        return of_heads + (Received(forward=handed, backward=handed) if grouped.ranks > 1 else NOTHING)

    def choose(self, shards: Shards, *, heads: int, way: str) -> Choice:
        """Raises ValueError where what is asked for cannot be."""
        refused = {}
        if heads == 1:
            refused["heads"] = "no ranks exchange heads (parallel.heads is 1)"
        elif self.heads < heads:
            refused["heads"] = f"its {self.heads} heads cannot be dealt to {heads} ranks"
        costs = {name: self.received(name, shards, heads=heads) for name in ("heads", "scan") if name not in refused}
        if way == "auto" and not self.affine and not refused:
            way = "heads"  # with a scan, ranks work on it one after the other, but for its heads
        return cheapest("states", way, costs, refused)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnShape:
    """What of a layer with states of its own decides their traffic."""

    state: int
    """Bytes of all its states."""

    def choose(self, shards: Shards) -> Choice:
        handed, ranks = hand_overs(shards) / shards.ranks * self.state, shards.ranks
        why = f"only the layer knows how its states change, so {ranks} ranks take turns"
        if len(shards.chunks) > 1:
            waits = f"each waits {1 - 4 / (3 * ranks):.0%} of its time"
            why += f", chunk after chunk: {waits}; with one chunk the next layer's turns begin meanwhile"
        return Choice("turns", {"turns": Received(forward=handed, backward=handed)}, {"all at once": why})


def cheapest(setting: str, way: str, costs: dict[str, Received], refused: dict[str, str]) -> Choice:
    if way in refused:
        raise ValueError(f"parallel.{setting} is {way}, and that cannot be: {refused[way]}; or use auto")
    if not costs:
        raise ValueError(f"parallel: no way to spread this layer: {refused}")
    return Choice(min(costs, key=lambda name: costs[name].total) if way == "auto" else way, costs, refused)
