"""The ranks that share a sequence as a mesh: neighbours exchange heads, groups of neighbours make up a ring."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from longtrain.parallel.ranks import Ranks

DIMS = ("cp_ring", "cp_ulysses")


@dataclass(frozen=True, slots=True)
class Mesh:
    """Rank ``g * heads.size + j`` of `all` is number j of group g: `heads` are its group, `ring` the numbers j of all groups."""

    all: Ranks
    heads: Ranks
    ring: Ranks
    rings: tuple[Ranks, Ranks] | None = None
    """Of `ring`, those of this machine, and this rank's likes of all machines; None where there are not several of both."""

    @classmethod
    def make(cls, everyone: Ranks, heads: int, machine: int | None = None) -> Mesh:
        """Of ranks of which `heads` neighbours exchange heads, and `machine` neighbours are tied together by faster links than all.

        All of them make it, at the same time. Raises ValueError for numbers that do not fit.
        """
        if heads < 1 or everyone.size % heads:
            raise ValueError(
                f"parallel: {everyone.size} ranks cannot be cut into groups of {heads} that exchange heads; give a divisor of their number"
            )
        if machine is not None and (everyone.size % machine or machine % heads):
            raise ValueError(
                f"parallel: {everyone.size} ranks, of which {heads} exchange heads, do not make up machines of {machine}; "
                "give a divisor of the one and a multiple of the other"
            )
        alone = Ranks.alone(everyone.traffic)
        if heads == everyone.size:
            return cls(everyone, everyone, alone)
        ranks, place = dist.get_process_group_ranks(everyone.group), everyone.rank
        group_of = lambda members: Ranks.of(_group(members, everyone.group), everyone.traffic)
        first = place // heads * heads
        of_ring = ranks[place % heads :: heads]
        of_heads, ring = (alone, everyone) if heads == 1 else map(group_of, (ranks[first : first + heads], of_ring))
        n = ring.size if machine is None else machine // heads
        rings = None
        if 1 < n < ring.size:
            first = ring.rank // n * n
            rings = group_of(of_ring[first : first + n]), group_of(of_ring[ring.rank % n :: n])
        return cls(everyone, of_heads, ring, rings)

    @property
    def flat(self) -> Mesh:
        """The same ranks, none of which exchange heads."""
        return Mesh(self.all, Ranks.alone(self.all.traffic), self.all)


def flattened(mesh: DeviceMesh) -> dist.ProcessGroup:
    """All processes of a device mesh with the dimensions `DIMS`, in its order. Raises ValueError for a mesh that is another."""
    ranks = mesh.mesh.flatten().tolist()
    if mesh.mesh_dim_names != DIMS or ranks != sorted(ranks):
        raise ValueError(f"parallel: the device mesh must have the dimensions {DIMS} and rising ranks, found {mesh}")
    return _group(ranks, dist.group.WORLD)


def _group(ranks: list[int], like: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group(ranks, timeout=patience(like), use_local_synchronization=True)


def patience(group: dist.ProcessGroup) -> timedelta:
    """How long a collective of a group may take. Groups made of it are given the same: by itself torch gives them its default."""
    return group._get_backend(group._device_types[0]).options._timeout
