"""What every test may rely on: a seeded generator, and torch's global settings as torch ships them."""

import os

# Before torch loads OpenMP: waiting threads sleep instead of spinning. On a machine that does other work too, tests of many small
# tensors take a seventh of the time; alone, the same.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from longtrain.offload.disk import IN_MEMORY
from longtrain.offload.system import System


def _global_settings() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "gradients enabled": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "CPU autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True)
def unchanged_global_settings():
    """A test that leaves torch in another state would change the meaning of those after it."""
    torch.manual_seed(0)
    before = _global_settings()
    yield
    assert _global_settings() == before


@pytest.fixture
def disk(tmp_path) -> str:
    """A directory on a disk."""
    if System().filesystem(str(tmp_path)) in IN_MEMORY:
        pytest.skip(f"NO DISK: {tmp_path} is in memory; give pytest --basetemp on a disk")
    return str(tmp_path)


@pytest.fixture
def one_thread():
    """For small cases: on a busy machine a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
