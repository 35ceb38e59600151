"""What goes wrong ends in a higher tier with one warning, or in one error that says what and where: never zeros, never a hang."""

import errno
import os
import random
import warnings
from collections import Counter

import numpy as np
import pytest
import torch

from longtrain.offload import DiskSettings, Place, TieredStore, check_disk
from longtrain.offload.checksum import ChecksumError, check, checksum
from longtrain.offload.extent import State
from longtrain.offload.system import System
from longtrain.span import Span
from tests.offload.schedules import Schedule, make_store
from tests.offload.stepped import Faults, Stepped

DISK, HOST = Place(tier="disk"), Place(tier="host")


def values(tokens: int, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))


def stepped(seed: int = 0, **faults: float) -> Stepped:
    return Stepped(seed, faults=Faults(**faults))


def open_store(system: System, *, host: int = 0, disk: int = 1 << 20, **settings) -> TieredStore:
    return TieredStore("cpu", host_bytes=host, disk=DiskSettings(path="/", budget=disk, **settings), staging_bytes=1 << 18, system=system)


class Faulty(Schedule):
    """Counts gets that were right, and those that said that they cannot be."""

    right = refused = 0

    def get(self, name: str, span: Span) -> None:
        try:
            super().get(name, span)
            self.right += 1
        except RuntimeError as error:
            assert "cannot be read back" in str(error) and "at offset" in str(error), error
            self.refused += 1


def fuzz(seed: int) -> dict[str, int]:
    """A random schedule among all faults at once."""
    draw = random.Random(seed)
    chances = {name: draw.choice((0, 0, 0.02, 0.1)) for name in ("no_space", "write_error", "read_error")}
    system = stepped(seed, short=0.3, no_direct=draw.random() < 0.2, **chances)
    store = make_store(system, draw, host=draw.choice((1 << 13, 1 << 19)), disk=draw.choice((1 << 14, 1 << 20)))
    schedule = Faulty(store, draw, layers=3, tokens=40, chunk=8)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            schedule.soup(12)
            store.settle()
            if draw.random() < 0.3:
                system.flip(draw.choice(system.at_rest), 0, 4096)
        schedule.finish()
    system.drain()
    assert len(warned) == min(1, store.stats.degraded), [str(w.message) for w in warned]
    return {"right": schedule.right, "refused": schedule.refused, "degraded": store.stats.degraded, **system.counts}


def judge(seeds: range) -> None:
    counts = sum((Counter(fuzz(seed)) for seed in seeds), Counter())
    print(f"\n{len(seeds)} schedules:", ", ".join(f"{n} {name}" for name, n in counts.items()))
    assert all(counts[name] for name in ("right", "refused", "degraded", "short", "no_space", "write_error", "read_error", "flip")), counts
    assert counts["refused"] < counts["right"] / 5


def test_faults_of_every_kind_give_right_bytes_or_an_error():
    judge(range(40))


@pytest.mark.slow
def test_faults_of_every_kind_in_a_thousand_schedules():
    judge(range(1000, 2000))


@pytest.mark.parametrize("fault", ["no_space", "write_error"])
@pytest.mark.parametrize("host, kept_in", [(1 << 20, "host memory"), (0, "device memory")])
def test_a_disk_that_refuses_writes_is_replaced_with_one_warning(fault, host, kept_in):
    system = stepped(**{fault: 1.0})
    store = open_store(system, host=host)
    with pytest.warns(RuntimeWarning, match=f"writing to memory.disk.path failed.*is kept in {kept_in}") as warned:
        for i in range(5):
            store.put("x", Span(8 * i, 8 * i + 8), values(8, seed=i), DISK)
            store.settle()
        found = store.get("x", Span(0, 40))
    assert torch.equal(found, torch.cat([values(8, seed=i) for i in range(5)], 1))
    assert len(warned) == 1 and store.stats.degraded == 5
    assert system.counts[fault] == 1  # a disk that failed is left alone
    if host:
        assert store.regions["host"].used == 5 * 8 * 64 * 4
    store.close()
    system.drain()


def test_what_was_written_before_the_disk_failed_is_still_read():
    system = stepped()
    store = open_store(system)
    store.put("x", Span(0, 8), values(8), DISK)
    store.settle()
    system.faults = Faults(no_space=1.0)
    with pytest.warns(RuntimeWarning):
        store.put("x", Span(8, 16), values(8, seed=1), DISK)
        store.settle()
        assert torch.equal(store.get("x", Span(0, 16)), torch.cat([values(8), values(8, seed=1)], 1))
    store.close()


@pytest.mark.parametrize("tier, budget", [("disk", "memory.disk.budget"), ("host", "memory.host_budget")])
def test_a_full_tier_names_its_budget(tier, budget):
    store = open_store(stepped(), host=8192 if tier == "host" else 0, disk=8192)
    with pytest.warns(RuntimeWarning, match=budget):
        for i in range(3):
            store.put(i, Span(0, 16), values(16, seed=i), Place(tier=tier))
    assert all(torch.equal(store.get(i, Span(0, 16)), values(16, seed=i)) for i in range(3))
    store.close()


def test_no_more_is_written_than_max_written():
    system = stepped()
    store = open_store(system, max_written=20_000)
    with pytest.warns(RuntimeWarning, match="max_written"):
        for i in range(6):
            store.put(i, Span(0, 16), values(16, seed=i), DISK)  # 4,096 bytes each
            store.settle()
            store.release(i)
    assert store.stats.disk_written == 16384
    store.close()


def test_a_write_that_was_not_needed_does_not_count():
    system = stepped()
    store = open_store(system)
    store.put("x", Span(0, 16), values(16), DISK)
    store.release("x")
    store.settle()
    assert store.stats.disk_written == 0
    store.close()


@pytest.mark.parametrize("place", [DISK, HOST])
def test_a_flipped_byte_is_named_with_its_place(place):
    system = stepped()
    store = open_store(system, host=1 << 20)
    store.put("layer 3 input", Span(0, 16), values(16), place)
    store.settle()
    extent = store._extents["layer 3 input"][Span(0, 16)].extent
    file, _, arena = system.at_rest  # in between: the slab
    first = extent.offset + extent.lead
    system.flip(file if place is DISK else arena, first, first + extent.nbytes)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"layer 3 input at .*offset {extent.offset:,} of the {place.tier} tier .*checksum"):
            store.get("layer 3 input", Span(0, 16))
    store.close()


def test_a_read_error_is_named_with_its_place():
    store = open_store(stepped(read_error=1.0))
    store.put("x", Span(0, 16), values(16), DISK)
    store.settle()
    with pytest.raises(RuntimeError, match="x at .*offset 0 of the disk tier .*Input/output error.*checkpoint"):
        store.get("x", Span(0, 16))
    store.close()


class Refused(Stepped):
    """No memory to be had."""

    def allocate(self, nbytes):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_a_refused_host_allocation_stops_with_the_setting():
    with pytest.raises(ValueError, match=r"memory.host_budget: 1,048,576 bytes cannot be had .*lower it"):
        TieredStore("cpu", host_bytes=1 << 20, system=Refused(0))


class Stuck(System):
    """A disk that never answers."""

    grace_seconds = 0.05
    least_bandwidth = 1e9

    def submit(self, job, urgent):
        pass


def test_a_disk_that_never_answers_is_an_error_and_no_hang(tmp_path):
    store = TieredStore("cpu", host_bytes=1 << 20, staging_bytes=1 << 18, system=Stuck())
    store.put("x", Span(0, 500), values(500), HOST)
    with pytest.raises(RuntimeError, match="128,000 bytes are not moved after 0 s, slower than 1000 MB/s"):
        store.put("y", Span(0, 500), values(500), HOST)


@pytest.mark.parametrize("place", [DISK, HOST, Place()])
def test_an_edit_before_the_write_is_over_is_refused(place):
    store = open_store(stepped(), host=1 << 20)
    x = values(16)
    store.put("x", Span(0, 16), x, place)
    x[0, 3] = 7
    with pytest.raises(RuntimeError, match="x at .*modified in place"):
        store.get("x", Span(0, 16))
    store.release("x")
    store.close()


def test_an_edit_before_the_write_is_over_stops_the_next_call():
    store = open_store(stepped())
    x = values(16)
    store.put("x", Span(0, 16), x, DISK)
    x[0, 3] = 7
    with pytest.raises(RuntimeError, match="x at .*modified in place"):
        store.settle()
        store.put("y", Span(0, 16), values(16), DISK)
    store.close()


def test_an_edit_after_the_write_changes_nothing():
    store = open_store(stepped())
    x = values(16)
    store.put("x", Span(0, 16), x, DISK)
    store.settle()
    x.zero_()
    assert torch.equal(store.get("x", Span(0, 16)), values(16))
    store.close()


def test_an_edit_of_what_was_fetched_does_not_reach_the_next_use():
    store = open_store(stepped())
    store.put("x", Span(0, 16), values(16), DISK)
    store.settle()
    store.prefetch([("x", Span(0, 16))] * 2)
    store.get("x", Span(0, 16)).zero_()
    assert torch.equal(store.get("x", Span(0, 16)), values(16))
    store.close()


@pytest.mark.parametrize("path, found, filesystem", [
    ("{tmp}/missing", "does not exist", "ext4"),
    ("{tmp}/file", "is not a directory", "ext4"),
    ("{tmp}", "is tmpfs, which is memory", "tmpfs"),
])
def test_a_path_that_cannot_work_is_named(tmp_path, path, found, filesystem):
    (tmp_path / "file").touch()
    system = System()
    system.filesystem = lambda path: filesystem
    with pytest.raises(ValueError, match=f"memory.disk.path: .*{found}"):
        check_disk(DiskSettings(path=path.format(tmp=tmp_path), budget=1 << 20), system)


def test_tmpfs_is_seen_for_what_it_is(tmp_path):
    if os.path.isdir("/dev/shm"):
        with pytest.raises(ValueError, match="/dev/shm is tmpfs"):
            check_disk(DiskSettings(path="/dev/shm", budget=1 << 20))
    assert System().filesystem(str(tmp_path)) != "tmpfs" or "tmpfs" in open("/proc/mounts").read()


def test_a_disk_that_is_too_small_says_by_how_much(tmp_path):
    free = System().free_bytes(str(tmp_path))
    system = System()
    system.filesystem = lambda path: "ext4"
    with pytest.raises(ValueError, match=r"memory.disk.budget: .* is \d+\.\d\d GiB more than .* set at most \d+MiB"):
        check_disk(DiskSettings(path=str(tmp_path), budget=free + (5 << 30)), system)


def test_extents_end_released():
    store = open_store(stepped())
    store.put("x", Span(0, 16), values(16), DISK)
    store.settle()
    store.release("x")
    store.names()
    assert [e.after for e in store.events] == [State.WRITING, State.STORED, State.RELEASED]
    store.close()
    with pytest.raises(RuntimeError, match="closed"):
        store.get("x", Span(0, 16))


class LateRefusal(Stepped):
    """O_DIRECT can be switched on, but transfers with it are refused, after others have begun."""

    on = False

    def direct(self, file, on):
        self.on = on

    def pwrite(self, file, data, offset):
        refused = self.on
        self._pause()
        if refused:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().pwrite(file, data, offset)


def test_a_disk_without_direct_access_is_used_through_the_page_cache():
    for seed in range(40):
        store = open_store(LateRefusal(seed))
        for i in range(6):
            store.put(i, Span(0, 8), values(8, seed=i), DISK)
        store.settle()
        assert store.stats.degraded == 0
        assert all(torch.equal(store.get(i, Span(0, 8)), values(8, seed=i)) for i in range(6))
        store.close()


def test_what_is_announced_first_is_fetched_before_what_was_announced():
    store = TieredStore("cpu", disk=DiskSettings(path="/", budget=1 << 20), staging_bytes=1 << 16, system=stepped())
    span, room = Span(0, 16), store.staging // 4096
    names = range(room + 4)
    for i in names:
        store.put(i, span, values(16, seed=i), DISK)
    store.settle()
    store.prefetch((i, span) for i in names[:-2])  # as many as staging holds are fetched now
    store.prefetch(((i, span) for i in names[-2:]), first=True)
    order = [0, *names[-2:], *names[1:-2]]
    assert all(torch.equal(store.get(i, span), values(16, seed=i)) for i in order)
    fetched = [event.label for event in store.events if event.after is State.READING]
    assert fetched == [f"{i} at {span}" for i in (*names[:room], *names[-2:], *names[room:-2])]
    store.close()


def test_an_expanded_tensor_takes_the_room_of_what_it_repeats():
    store = open_store(stepped())
    x = values(1).expand(1, 500, 64)
    store.put("x", Span(0, 500), x, DISK)
    store.settle()
    assert store.regions["disk"].used <= 2 * 4096  # a page; two where its 256 bytes lie across the end of one
    assert torch.equal(store.get("x", Span(3, 77)), x[:, 3:77])
    store.close()


def test_conjugates_and_negatives_are_stored_as_what_they_stand_for():
    store = open_store(stepped())
    x = torch.complex(torch.randn(1, 16, 4), torch.randn(1, 16, 4)).conj()
    assert x.is_conj() and x.imag.is_neg()  # views whose bytes are not yet what they stand for
    for name, tensor in {"conjugate": x, "negative": x.imag}.items():
        store.put(name, Span(0, 16), tensor, DISK)
        store.settle()
        assert torch.equal(store.get(name, Span(0, 16)), tensor)
    store.close()


def test_a_checksum_is_of_the_bytes_of_their_extent_and_of_their_place():
    data = np.arange(43, dtype=np.uint8)
    found = {checksum(data, 1, 4096), checksum(data, 2, 4096), checksum(data, 1, 8192), checksum(data[:42], 1, 4096)}
    assert len(found) == 4
    check(data, 1, 4096, checksum(data, 1, 4096))
    for other in (checksum(data, 1, 8192), None):
        with pytest.raises(ChecksumError):
            check(data, 1, 4096, other)
