"""A mixer over ranks: it does with the tokens of all what `base` does alone, for the streaming engine chunk by chunk or in two passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from longtrain.parallel.alltoall import AllToAll, Alone, Heads
from longtrain.parallel.by_heads import ByHeads
from longtrain.parallel.carry import Halo, QueriesTravel, Staying
from longtrain.parallel.double_ring import DoubleRing
from longtrain.parallel.exchange import ROUNDS
from longtrain.parallel.layout import Shards
from longtrain.parallel.mesh import Mesh
from longtrain.parallel.ring import Ring
from longtrain.parallel.way import Way, delta_of
from longtrain.span import Span
from longtrain.stream.carry import make_carry
from longtrain.stream.protocol import Carry

CARRIES: dict[str, type[Staying]] = {"queries": QueriesTravel, "halo": Halo}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OverRanks:
    """Inputs and output as `base`'s, of the tokens that this rank holds; `base` is in positions of the whole sequence.

    `way`: one of `longtrain.parallel.settings.WAYS` between groups, where there are several.
    """

    base: object
    mesh: Mesh
    shards: Shards
    way: str
    heads: tuple[int, int]
    """Query heads and kv heads."""

    shared = ()

    @property
    def causal(self) -> bool:
        """Whether a chunk needs nothing of later ones, and no keys of earlier ones but those it carries."""
        return self.base.causal and self.way != "ring"

    def make_carry(self, spans: Sequence[Span]) -> Carry:
        mesh = self.mesh
        if mesh.heads.size == 1:
            return CARRIES[self.way](self.base, mesh.ring, self.shards)
        grouped = self.shards.grouped(mesh.heads.size)
        if mesh.ring.size == 1:
            make_inner, parts = make_carry, min(ROUNDS, self.shards.runs)
        else:
            parts = 1
            make_inner = lambda mixer, _: CARRIES[self.way](mixer, mesh.ring, grouped)
        inner_spans = grouped.local_chunks(mesh.ring.rank)
        return ByHeads(self.base, mesh.heads, self._members, inner_spans, make_inner, Heads(*self.heads, mesh.heads.size), parts)

    def attend_whole(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        """Output and LSE of all queries on all keys, in two passes over the sequence."""
        return self._whole.attend(self.base, q_BTHD, k_BTKD, v_BTKD)

    def attend_whole_vjp(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._whole.attend_vjp(self.base, dout, q, k, v, lse, delta_of(dout, out, lse))

    def with_shared(self) -> OverRanks:
        return self

    def by_group(self, *qkv: Tensor) -> Iterator[tuple[slice, OverRanks, tuple[Tensor, ...]]]:
        """All heads at once: what is in flight hides behind what is computed."""
        yield slice(None), self, qkv

    @property
    def _members(self) -> Shards:
        """What each rank of this one's group holds of the group's tokens."""
        first = self.mesh.ring.rank * self.mesh.heads.size
        return Shards(self.shards.chunks, tuple(part[first : first + self.mesh.heads.size] for part in self.shards.parts))

    @property
    def _whole(self) -> Way:
        grouped, members = self.shards.grouped(self.mesh.heads.size), self._members
        groups = tuple(grouped.spans(g) for g in range(grouped.ranks))
        if len(groups) == 1:
            inner = Alone(groups[0])
        else:
            inner = Ring(self.mesh.ring, groups) if self.mesh.rings is None else DoubleRing(*self.mesh.rings, groups)
        if self.mesh.heads.size == 1:
            return inner
        spans = tuple(members.spans(r) for r in range(members.ranks))
        return AllToAll(self.mesh.heads, spans, Heads(*self.heads, self.mesh.heads.size, keys_travel=len(groups) > 1), inner)
