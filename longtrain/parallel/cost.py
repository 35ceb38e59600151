"""Bytes that a rank receives for one layer, each way, and which way is cheapest. The modules' docstrings derive the sums.

U ranks exchange heads, in each of R groups that hold different tokens (P = U R). Between the exchanges the groups bring queries and keys
together in one of the WAYS, with the heads of one rank. Means over ranks, in bytes, for a sequence whose tokens are all needed by all;
windows count their halo.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from longtrain.parallel.alltoall import Heads
from longtrain.parallel.settings import WAYS


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of a mixer decides its traffic."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int
    window: int | None = None
    """Tokens that a query sees, itself and those to the left of it; None for all."""
    causal: bool = True

    @property
    def kv(self) -> int:
        """Bytes of the keys and values of a token."""
        return self.kv_heads * (self.head_dim + self.value_dim) * self.itemsize

    @property
    def wide(self) -> int:
        return max(4, self.itemsize)


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """Bytes in the forward pass and in the backward pass."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: Received) -> Received:
        return Received(forward=self.forward + other.forward, backward=self.backward + other.backward)


NOTHING = Received(forward=0, backward=0)


def received(way: str, shape: Shape, tokens: int, *, heads: int = 1, ring: int = 1, chunks: int = 1, blocks: bool = False) -> Received:
    """For one layer whose outputs are stored: heads over `heads` ranks, `way` over `ring` groups of them, a sequence in `chunks`; `blocks`:
    keys and values stay in the token store by heads, and do not travel again."""
    inner = shape if heads == 1 else _of_one_rank(shape, heads)
    over_groups = _over_groups(way, inner, tokens, ring, chunks) if ring > 1 else NOTHING
    return over_groups + (_over_heads(shape, tokens / ring, heads, blocks and _whole(shape)) if heads > 1 else NOTHING)


def _whole(shape: Shape) -> bool:
    """Whether its keys and values come in blocks, where a plan has any."""
    return shape.causal and shape.window is None


def _of_one_rank(shape: Shape, ranks: int) -> Shape:
    split = Heads(shape.heads, shape.kv_heads, ranks)
    of_first, of_keys = split.of_queries(0), split.of_keys(0)
    return Shape(
        heads=max(1, of_first.stop - of_first.start), kv_heads=of_keys.stop - of_keys.start, head_dim=shape.head_dim,
        value_dim=shape.value_dim, itemsize=shape.itemsize, window=shape.window, causal=shape.causal,
    )


def _over_heads(shape: Shape, tokens: float, ranks: int, kept: bool) -> Received:
    split, b, w, D = Heads(shape.heads, shape.kv_heads, ranks), shape.itemsize, shape.wide, shape.head_dim + shape.value_dim
    away = tokens / ranks * (ranks - 1) / ranks
    keys = shape.kv * sum(heads.stop - heads.start for heads in map(split.of_keys, range(ranks))) / shape.kv_heads
    gradients = keys // b * w if split.replicated else keys
    there_and_back = away * shape.heads * D * b  # q there and the output back; dout there and dq back
    return Received(  # in the backward pass queries go there again, with LSE and delta, and keys before them
        forward=there_and_back + away * (shape.heads * w + keys),
        backward=there_and_back + away * (shape.heads * (shape.head_dim * b + 2 * w) + keys * (not kept) + gradients),
    )


def _over_groups(way: str, shape: Shape, tokens: float, groups: int, chunks: int) -> Received:
    H, D, Dv, b, w, kv = shape.heads, shape.head_dim, shape.value_dim, shape.itemsize, shape.wide, shape.kv
    away, made = tokens * (groups - 1) / groups, kv // b * w
    if way == "ring":
        return Received(forward=away * kv, backward=away * (kv + made))
    if way == "queries":
        return Received(forward=away * H * (D * b + (Dv + 1) * w), backward=away * H * ((D + Dv) * b + (D + 2) * w))
    halo = chunks * min(tokens if shape.window is None else shape.window - 1, away)
    return Received(forward=halo * kv, backward=halo * (kv + made))


@dataclass(frozen=True, slots=True)
class Choice:
    """The way of one mixer, and what each would have cost."""

    way: str
    costs: dict[str, Received]
    refused: dict[str, str]

    def __str__(self) -> str:
        said = [f"{name} {of.forward / 2**20:,.1f} + {of.backward / 2**20:,.1f} MiB" for name, of in self.costs.items()]
        reasons = {why: ", ".join(name for name, other in self.refused.items() if other == why) for why in self.refused.values()}
        return "; ".join([f"{self.way} ({', '.join(said)})", *(f"not {names}: {why}" for why, names in reasons.items())])


def choose(
    shape: Shape, tokens: int, *, heads: int, ring: int, chunks: int, runs: int = 1, segment_layers: int = 1, blocks: bool = False,
    way: str = "auto",
) -> Choice:
    """The cheapest way of `heads` x `ring` ranks, or the one that is asked for. `runs`: spans of a chunk that a rank holds; `blocks`: keys
    and values come to the device in blocks.

    A halo goes over all ranks alike. Raises ValueError where what is asked for cannot be.
    """
    refused: dict[str, str] = {}
    if ring == 1:
        refused = dict.fromkeys(("ring", "queries"), "all ranks exchange heads; set parallel.heads below their number")
    else:
        refused["heads"] = f"{ring} groups of ranks hold different tokens; set parallel.heads to the number of ranks"
    if ring > 1 and not shape.causal:
        refused["queries"] = "a query sees what comes after its chunk"
    if ring > 1 and segment_layers > 1:
        refused["ring"] = "it needs two passes over the sequence, and segments of several layers are streamed chunk by chunk"
    if ring > 1 and blocks and _whole(shape):
        refused["ring"] = "all of a layer's keys travel in it at one time, and kv_block_tokens has them come in blocks"
    if shape.window is None or not shape.causal:
        refused["halo"] = "a query sees all that came before it"
    if way in refused:
        raise ValueError(f"parallel.way is {way}, and that cannot be: {refused[way]}; or use auto")
    of = partial(received, shape=shape, tokens=tokens, heads=heads, ring=ring, chunks=chunks, blocks=blocks)
    costs = {name: of(name) for name in WAYS[:2] if name not in refused} if ring > 1 else {"heads": of("heads")}
    if "halo" not in refused:
        costs["halo"] = received("halo", shape, tokens, ring=heads * ring, chunks=chunks * runs)
    if not costs:
        raise ValueError(f"parallel: no way to spread this layer: {refused}; let all ranks exchange heads, or use segment_layers=1")
    return Choice(min(costs, key=lambda name: costs[name].total) if way == "auto" else way, costs, refused)
