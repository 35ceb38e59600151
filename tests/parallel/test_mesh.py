"""Groups that are made of others: whoever waits in them waits as long as in those."""

from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from longtrain.parallel.mesh import DIMS, Mesh, flattened, patience
from longtrain.parallel.ranks import Ranks
from longtrain.train.distribute import make_mesh
from tests.processes import COLLECTIVE_SECONDS, run_ranks


def groups(rank: int, world: int) -> None:
    of_world, own = timedelta(seconds=COLLECTIVE_SECONDS), timedelta(seconds=77)
    assert patience(dist.group.WORLD) == of_world
    for group, expected in ((None, of_world), (dist.new_group(timeout=own), own)):
        mesh = Mesh.make(Ranks.of(group), heads=2)
        assert [patience(ranks.group) for ranks in (mesh.all, mesh.heads, mesh.ring)] == [expected] * 3
        mesh = Mesh.make(Ranks.of(group), heads=1, machine=2)
        assert [patience(ranks.group) for ranks in mesh.rings] == [expected] * 2
    assert patience(flattened(init_device_mesh("cpu", (2, 2), mesh_dim_names=DIMS))) == of_world
    with pytest.raises(ValueError, match="the device mesh must have the dimensions .'cp_ring', 'cp_ulysses'. and rising ranks"):
        flattened(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp_ulysses")))
    assert [patience(group) for group in make_mesh("cpu", (2, 2), ("dp_replicate", "kept")).get_all_groups()] == [of_world] * 2


def test_groups_of_four_processes():
    run_ranks(groups, 4)
