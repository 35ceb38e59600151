"""The store on the machine's own disk and threads."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from longtrain.offload import DiskSettings, Place, TieredStore
from longtrain.offload.disk import IN_MEMORY
from longtrain.offload.regions import Regions
from longtrain.offload.system import System
from longtrain.span import Span
from tests.offload.schedules import Schedule

DISK = Place(tier="disk")
ROOT = Path(__file__).resolve().parents[2]


class Here(System):
    """This machine, where its temporary files may be in memory."""

    def filesystem(self, path: str) -> str:
        kind = super().filesystem(path)
        return "" if kind in IN_MEMORY else kind


class Late(Here):
    """Every transfer is late by a drawn time."""

    def copy(self, target, source):
        time.sleep(random.random() * 1e-3)
        super().copy(target, source)

    def pwrite(self, file, data, offset):
        time.sleep(random.random() * 1e-3)
        return super().pwrite(file, data[: random.randrange(1, len(data) + 1)], offset)

    def pread(self, file, data, offset):
        time.sleep(random.random() * 1e-3)
        return super().pread(file, data, offset)


def threaded_schedule(tmp_path, seed: int) -> None:
    draw = random.Random(seed)
    disk = DiskSettings(path=str(tmp_path), budget=1 << 22)
    store = TieredStore("cpu", host_bytes=1 << 20, disk=disk, staging_bytes=1 << 18, system=Late())
    schedule = Schedule(store, draw, layers=3, tokens=40, chunk=8)
    schedule.soup(60)
    schedule.training_step()
    schedule.finish()


def test_schedules_in_threads_on_the_disk(tmp_path):
    for seed in range(8):
        threaded_schedule(tmp_path, seed)


@pytest.mark.slow
def test_two_hundred_schedules_in_threads_on_the_disk(tmp_path):
    for seed in range(100, 300):
        threaded_schedule(tmp_path, seed)


def test_large_extents_of_many_blocks(tmp_path):
    x = torch.randn(1, 1000, 3001)
    store = TieredStore("cpu", disk=DiskSettings(path=str(tmp_path), budget=1 << 26), staging_bytes=1 << 23, system=Here())
    for i in range(3):
        store.put(i, Span(0, 1000), x + i, DISK)
    for i in range(3):
        assert torch.equal(store.get(i, Span(17, 900)), x[:, 17:900] + i)
    assert store.stats.most_writing <= max(store.staging, x.nbytes)
    store.close()


@pytest.mark.parametrize("first, count", [(0, 1 << 19), (1, 300_001), (16, 65_536), (1000, 200_003)])
def test_the_disk_takes_a_large_tensor_from_where_it_is_and_fills_one(tmp_path, first, count):
    """Wherever in a page of memory it begins and ends, its neighbours are left as they are, and no copy is made."""

    class Counting(Here):
        copies = 0

        def copy(self, target, source):
            self.copies += 1
            super().copy(target, source)

    system = Counting()
    store = TieredStore("cpu", disk=DiskSettings(path=str(tmp_path), budget=1 << 24), staging_bytes=1 << 22, system=system)
    whole = torch.arange(1 << 20, dtype=torch.int32)
    x = whole[first : first + count][None]
    for name in ("a", "b"):  # the second finds the memory that the first gave back
        store.put(name, Span(0, count), x, DISK)
        store.settle()
        before = system.copies
        assert torch.equal(store.get(name, Span(0, count)), x)
    assert torch.equal(whole, torch.arange(1 << 20, dtype=torch.int32))
    assert system.copies == 0 if x.data_ptr() % 8 == 0 else before == system.copies > 0
    store.release("a"), store.release("b")
    store.settle()
    assert store.regions["disk"].used == 0
    store.close()


def test_staging_is_kept_to_in_what_is_fetched_ahead(tmp_path):
    store = TieredStore("cpu", disk=DiskSettings(path=str(tmp_path), budget=1 << 24), staging_bytes=1 << 18, system=Here())
    for i in range(20):
        store.put("x", Span(i, i + 1), torch.full((1, 1, 5000), float(i)), DISK)
    store.prefetch([("x", Span(i, i + 1)) for i in reversed(range(20))])
    for i in reversed(range(20)):
        assert (store.get("x", Span(i, i + 1)) == i).all()
    assert 20_000 < store.stats.most_fetched <= store.staging + 20_000  # beyond it only what is asked for now
    store.close()


def test_memory_is_not_used_again_while_a_tensor_has_it(tmp_path):
    store = TieredStore("cpu", disk=DiskSettings(path=str(tmp_path), budget=1 << 24), staging_bytes=1 << 20, system=Here())
    for i in range(12):
        store.put("x", Span(i, i + 1), torch.full((1, 1, 5000), float(i)), DISK)
    store.settle()
    kept = [store.get("x", Span(i, i + 1))[:, :, 7:] for i in range(6)]
    addresses = {tensor.data_ptr() for tensor in kept}
    kept[1] = None
    more = [store.get("x", Span(i, i + 1)) for i in range(6, 12)]
    assert sum(tensor.data_ptr() + 28 in addresses for tensor in more) == 1
    assert all((tensor == i).all() for i, tensor in enumerate([*kept, *more]) if tensor is not None)
    store.close()
    assert all((tensor == i).all() for i, tensor in enumerate([*kept, *more]) if tensor is not None)


def test_equal_bytes_are_written_once(tmp_path):
    store = TieredStore("cpu", disk=DiskSettings(path=str(tmp_path), budget=1 << 24), staging_bytes=1 << 20, system=Here())
    fused = torch.randn(1, 64, 192)
    q, k = fused[:, :, :96], fused[:, :, 96:]
    names = {"x": fused, "again": fused.view(1, 64, 192), "turned": fused.transpose(0, 2).transpose(0, 2), "q": q, "k": k, "q too": q}
    for name, tensor in names.items():
        store.put(name, Span(0, 64), tensor, DISK)
    assert store.stats.deduplicated == 3 and store.regions["disk"].used == 2 * fused.nbytes
    store.release("x")
    for name, tensor in {"again": fused, "q": q, "k": k, "q too": q}.items():
        assert torch.equal(store.get(name, Span(0, 64)), tensor)
    old = fused.clone()
    store.settle()
    fused.add_(1)
    store.put("edited", Span(0, 64), fused, DISK)
    assert torch.equal(store.get("edited", Span(0, 64)), old + 1) and torch.equal(store.get("again", Span(0, 64)), old)
    store.close()


def test_an_address_that_is_used_again_is_no_duplicate(tmp_path):
    store = TieredStore("cpu", disk=DiskSettings(path=str(tmp_path), budget=1 << 26), staging_bytes=1 << 20, system=Here())
    for i in range(50):
        store.put(i, Span(0, 64), torch.full((1, 64, 1024), float(i)), DISK)
        store.get(i, Span(0, 64))
    assert store.stats.deduplicated == 0
    assert all((store.get(i, Span(0, 64)) == i).all() for i in range(50))
    store.close()


RUN = """
import os, queue, resource, sys, tempfile, threading, time, torch, warnings
from longtrain.offload import DiskSettings, Place, TieredStore
from longtrain.offload.system import System
from longtrain.span import Span
from tests.offload.test_disk import Here
"""


def python(code: str, *arguments: str, first: str = "") -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", first + RUN + textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_killed_process_leaves_nothing_behind(tmp_path):
    process = python("""
        store = TieredStore("cpu", disk=DiskSettings(path=sys.argv[1], budget=64 << 20), staging_bytes=1 << 20, system=Here())
        print("made", flush=True)
        for i in range(10**6):
            store.put(i, Span(0, 64), torch.randn(1, 64, 1024), Place(tier="disk"))
            store.release(i - 100)
    """, str(tmp_path))
    assert process.stdout.readline() == "made\n"
    assert os.listdir(tmp_path) == []  # not even while it runs
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert os.listdir(tmp_path) == []


def test_a_file_that_the_system_refuses_stops_with_the_setting(tmp_path):
    process = python("""
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            TieredStore("cpu", disk=DiskSettings(path=sys.argv[1], budget=8 << 20), system=Here())
        except ValueError as error:
            print(error)
    """, str(tmp_path))
    out = process.communicate()[0]
    assert out.startswith("memory.disk: a file of 8 MiB cannot be made in") and "File too large" in out and os.listdir(tmp_path) == []


def test_a_disk_that_is_full_half_way(tmp_path):
    """A file that was not preallocated, and a limit in the midst of it: the kernel writes part, then refuses."""
    process = python("""
        class Sparse(Here):
            def open(self, path, nbytes):
                return tempfile.TemporaryFile(dir=path, buffering=0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        store = TieredStore("cpu", disk=DiskSettings(path=sys.argv[1], budget=8 << 20), staging_bytes=1 << 20, system=Sparse())
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for i in range(20):
                store.put(i, Span(0, 16), torch.full((1, 16, 1000), float(i)), Place(tier="disk"))
            assert all((store.get(i, Span(0, 16)) == i).all() for i in range(20))
        print(len(warned), store.stats.degraded > 0, store.stats.read.get("disk", 0) > 0, warned[0].message)
        store.close()
    """, str(tmp_path))
    out = process.communicate()[0]
    assert out.startswith("1 True True offload: writing to memory.disk.path failed ([Errno 27] File too large)"), out


def test_threads_end_with_the_store(tmp_path):
    before = set(threading.enumerate())
    store = TieredStore("cpu", disk=DiskSettings(path=str(tmp_path), budget=1 << 20), system=Here())
    store.put("x", Span(0, 1), torch.ones(1, 1, 8), DISK)
    store.get("x", Span(0, 1))
    del store
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()


def test_an_interpreter_that_ends_before_its_store_says_nothing(tmp_path):
    """Modules are emptied last come, first gone: the store, in one that came early, outlives what it is made of."""
    process = python("""
        os.dup2(1, 2)
        sys.keeper.store = TieredStore("cpu", disk=DiskSettings(path=sys.argv[1], budget=1 << 20), system=Here())
        sys.keeper.store.put("x", Span(0, 1), torch.ones(1, 1, 8), Place(tier="disk"))
        sys.alive = queue, threading
    """, str(tmp_path), first="import sys, types; sys.modules['keeper'] = sys.keeper = types.ModuleType('keeper')\n")
    assert process.communicate()[0] == "" and process.returncode == 0


def test_regions_join_and_reuse():
    draw, regions, taken = random.Random(0), Regions(1 << 16, 64), {}
    for _ in range(3000):
        if draw.random() < 0.55 and (at := regions.take(n := draw.randrange(1, 5000))) is not None:
            assert at % 64 == 0 and at + n <= 1 << 16
            assert all(at + n <= b or b + m <= at for b, m in taken.items())
            taken[at] = n
        elif taken:
            at = draw.choice(list(taken))
            regions.give(at, taken.pop(at))
    for at, n in taken.items():
        regions.give(at, n)
    assert regions.used == 0 and regions.take(1 << 16) == 0
    with pytest.raises(RuntimeError, match="free already"):
        Regions(1 << 16, 64).give(64, 64)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_small_file_system_that_runs_full(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("this system does not mount tmpfs")
    try:
        system = Here()
        system.open = lambda path, nbytes: tempfile.TemporaryFile(dir=path, buffering=0)
        system.free_bytes = lambda path: 1 << 30
        store = TieredStore("cpu", disk=DiskSettings(path=str(tmp_path), budget=8 << 20), staging_bytes=1 << 20, system=system)
        with pytest.warns(RuntimeWarning, match="No space left on device") as warned:
            for i in range(20):
                store.put(i, Span(0, 16), torch.full((1, 16, 1000), float(i)), DISK)
            assert all((store.get(i, Span(0, 16)) == i).all() for i in range(20))
        assert len(warned) == 1
        store.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
