"""The ranks that share a sequence as a mesh: neighbours exchange heads, groups of neighbours make up a ring."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from longtrain.parallel.ranks import Ranks, Traffic

DIMS = ("cp_ring", "cp_ulysses")


@dataclass(frozen=True, slots=True)
class Mesh:
    """Rank ``g * heads.size + j`` of `all` is number j of group g: `heads` are its group, `ring` the numbers j of all groups."""

    all: Ranks
    heads: Ranks
    ring: Ranks

    @classmethod
    def make(cls, group: dist.ProcessGroup | DeviceMesh | None, heads: int, traffic: Traffic | None = None) -> Mesh:
        """From a device mesh with the dimensions `DIMS`, or a group (None: all processes) of which `heads` neighbours exchange heads.

        Every rank of the group makes it, at the same time. Raises ValueError for a mesh that is another.
        """
        traffic = Traffic() if traffic is None else traffic
        if isinstance(group, DeviceMesh):
            ranks = group.mesh.flatten().tolist()
            if group.mesh_dim_names != DIMS or ranks != sorted(ranks):
                raise ValueError(f"parallel: the device mesh must have the dimensions {DIMS} and rising ranks, found {group}")
            group, heads = dist.new_group(ranks, use_local_synchronization=True), group.size(1)
        everyone = Ranks.of(group, traffic)
        if heads < 1 or everyone.size % heads:
            raise ValueError(
                f"parallel: {everyone.size} ranks cannot be cut into groups of {heads} that exchange heads; give a divisor of their number"
            )
        if heads == everyone.size:
            return cls(everyone, everyone, Ranks.alone(traffic))
        if heads == 1:
            return cls(everyone, Ranks.alone(traffic), everyone)
        ranks, place = dist.get_process_group_ranks(everyone.group), everyone.rank
        first = place // heads * heads
        members = ranks[first : first + heads], ranks[place % heads :: heads]
        of_heads, of_ring = (dist.new_group(of_group, use_local_synchronization=True) for of_group in members)
        return cls(everyone, Ranks.of(of_heads, traffic), Ranks.of(of_ring, traffic))

    @property
    def flat(self) -> Mesh:
        """The same ranks, none of which exchange heads."""
        return Mesh(self.all, Ranks.alone(self.all.traffic), self.all)
