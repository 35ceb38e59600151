"""No order of transfers changes a byte, and every wait is needed."""

import pytest

from longtrain.offload.system import WAITS
from tests.offload.schedules import run_schedule
from tests.offload.stepped import Faults

HERE = [wait for wait in WAITS if wait not in ("computed", "copied")]
"""The two others order a GPU's streams."""


def compare(seeds: range) -> int:
    return sum(run_schedule(seed, faults=Faults(short=0.2, no_direct=seed % 5 == 0)).compared for seed in seeds)


def test_two_hundred_schedules_change_nothing():
    assert compare(range(200)) > 200 * 20


@pytest.mark.slow
def test_two_thousand_schedules_change_nothing():
    assert compare(range(1000, 3000)) > 2000 * 20


@pytest.mark.parametrize("wait", HERE)
def test_a_wait_that_is_left_out_is_caught(wait):
    caught = []
    for seed in range(200):
        try:
            run_schedule(seed, leave_out=wait)
        except (AssertionError, RuntimeError) as error:
            caught.append(str(error))
            if len(caught) == 3:
                break
    assert len(caught) == 3, f"{wait} is not needed by any of these schedules"


def test_the_same_seed_is_the_same_schedule():
    first, second = (run_schedule(7).store for _ in range(2))
    assert [e[1:] for e in first.events] == [e[1:] for e in second.events] and len(first.events) > 100
