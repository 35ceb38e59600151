"""Several gloo processes on this machine, as every multi-process test starts them."""

import faulthandler
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

COLLECTIVE_SECONDS, PROCESS_SECONDS = 300, 1200


def run_ranks(work, world: int, *args) -> None:
    """``work(rank, world, *args)`` in `world` processes of one thread each, in one gloo group; raises what the first to fail raised.

    They meet through a file: a port chosen in advance can be taken, or answer itself. Nothing waits for ever: a collective has
    `COLLECTIVE_SECONDS`, and a process that still runs after `PROCESS_SECONDS` prints where each of its threads is and exits.
    """
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_process, (world, Path(directory) / "ranks", work, args), nprocs=world)


def _process(rank: int, world: int, meeting: Path, work, args) -> None:
    faulthandler.dump_traceback_later(PROCESS_SECONDS, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=meeting.as_uri(), rank=rank, world_size=world, timeout=timedelta(seconds=COLLECTIVE_SECONDS)
    )
    work(rank, world, *args)
    dist.barrier()  # the last to arrive still reads the file of the first
    dist.destroy_process_group()
    # What is tested is done. The interpreter's own end races with threads of gloo's that are still there: once in some dozens of runs
    # it aborts ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
