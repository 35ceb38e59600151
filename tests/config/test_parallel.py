"""The section `parallel`: which meshes a number of processes make."""

import pytest

from longtrain.config.parallel import ParallelConfig


@pytest.mark.parametrize(
    "settings, processes, mesh",
    [
        (dict(), 1, (1, 1, 1, 1)),
        (dict(cp_ulysses=8), 1, (1, 1, 1, 1)),
        (dict(cp_ring=2, cp_ulysses=4), 8, (1, 1, 2, 4)),
        (dict(cp_ulysses=None), 3, (1, 1, 1, 3)),
        (dict(dp_replicate=2, dp_shard=None, cp_ring=2), 8, (2, 2, 2, 1)),
        (dict(dp_shard=None, cp_ring=2), 2, (1, 1, 2, 1)),
    ],
)
def test_processes_that_fit(settings, processes, mesh):
    assert ParallelConfig(**settings).sizes(processes) == mesh


@pytest.mark.parametrize(
    "settings, processes, says",
    [
        (dict(), 2, "dp_replicate 1 x dp_shard 1 x cp_ring 1 x cp_ulysses 1 make 1 processes, and 2 were started; start 1"),
        (dict(cp_ulysses=8), 4, "make 8 processes, and 4 were started"),
        (dict(cp_ring=4, dp_shard=None), 6, "dp_shard what is left x cp_ring 4 .* make a multiple of 4 processes, and 6"),
    ],
)
def test_processes_that_do_not(settings, processes, says):
    with pytest.raises(ValueError, match=says):
        ParallelConfig(**settings).sizes(processes)
