"""Checkpoints on disk: there whole or not at all, and checked before they are used.

    checkpoints/step-00000120/            renamed into place after everything in it was on disk
        manifest.json                     size and CRC-32 of every other file
        facts.json                        step, position in the data, plan, names and shapes of the tensors
        config.yaml                       the resolved configuration
        .metadata, __0_0.distcp           the tensors, by torch.distributed.checkpoint
    checkpoints/.step-00000160.partial/   being written, or left by a process that died: removed at the next start

Nothing here knows what the tensors mean (`state.py` does) or when to save (`loop.py` does).
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

MANIFEST, FACTS, CONFIG = "manifest.json", "facts.json", "config.yaml"
PREFIX, PARTIAL = "step-", ".partial"
BLOCK = 4 * 2**20


class DamagedCheckpoint(Exception):
    """A checkpoint is not what was written; the message names it and the file."""


@contextmanager
def one_process() -> Iterator[None]:
    """Around all use of checkpoints without a process group: torch warns of that each time. Enter it in the main thread."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def path_of(directory: Path, step: int) -> Path:
    return directory / f"{PREFIX}{step:08}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def write_checkpoint(
    checkpoint: Path, tensors: Mapping[str, Tensor], facts: Mapping, config: str, group: dist.ProcessGroup | None = None
) -> int:
    """Write all of it beside its place, flush it, rename it. Returns the bytes written; raises OSError.

    With a `group` (which must serve CPU tensors) every rank calls this with its own tensors: distributed ones are written by those who
    hold them, others once. The directory must be one that all ranks see.
    """
    rank = dist.get_rank(group) if group is not None else 0
    partial = checkpoint.with_name(f".{checkpoint.name}{PARTIAL}")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    if group is not None:
        dist.barrier(group)
    try:
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(partial), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise _cause(error) from error
    sums = {file.name: _size_and_sum(file) for file in sorted(partial.glob(f"__{rank}_*"))}
    if group is not None:
        gathered = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, sums, group)
        sums = {name: entry for part in gathered for name, entry in part.items()}
    if rank == 0:
        _write_flushed(partial / FACTS, json.dumps(facts, indent=1))
        _write_flushed(partial / CONFIG, config)
        sums |= {file.name: _size_and_sum(file) for file in sorted(partial.iterdir()) if file.name not in sums}
        _write_flushed(partial / MANIFEST, json.dumps(sums, indent=1))
        _flush_directory(partial)
        remove(checkpoint)
        os.rename(partial, checkpoint)
        _flush_directory(checkpoint.parent)
    if group is not None:
        dist.barrier(group)
    return sum(size for size, _ in sums.values())


def check(checkpoint: Path) -> None:
    """Raise DamagedCheckpoint unless every file has the size and the sum it was written with."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        for name, written in manifest.items():
            size, found = (checkpoint / name).stat().st_size, None
            if size == written[0]:
                found = _size_and_sum(checkpoint / name)
            if found != written:
                what = "its bytes have changed" if found else f"it has {size:,} bytes of {written[0]:,}"
                raise DamagedCheckpoint(f"{checkpoint} is damaged: {name}: {what}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DamagedCheckpoint(f"{checkpoint} is damaged: {getattr(error, 'filename', None) or MANIFEST}: {error}") from error


def read_facts(checkpoint: Path) -> dict:
    return json.loads((checkpoint / FACTS).read_text(encoding="utf-8"))


def read_tensors(checkpoint: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill `tensors` in place; names and shapes are those of the checkpoint's facts."""
    try:
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise _cause(error) from error


def list_checkpoints(directory: Path) -> list[Path]:
    """Those that stand in `directory`, oldest first. They were whole when they were written."""
    return sorted(path for path in directory.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit())


def newest_whole(directory: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that passes `check` (None without one), and what is wrong with those that are newer."""
    refused = {}
    for checkpoint in reversed(list_checkpoints(directory)):
        try:
            check(checkpoint)
        except DamagedCheckpoint as error:
            refused[checkpoint] = str(error)
        else:
            return checkpoint, refused
    return None, refused


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it neither counts nor is lost; returns the new name."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def remove(checkpoint: Path) -> None:
    """First the name goes, so that a half removed checkpoint is not one that looks damaged."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".{checkpoint.name}.removed{PARTIAL}")
        os.rename(checkpoint, doomed)
        shutil.rmtree(doomed)


def remove_partial(directory: Path) -> list[str]:
    """Remove what was half written or half removed; returns the names."""
    partial = sorted(directory.glob(f".{PREFIX}*{PARTIAL}"))
    for path in partial:
        shutil.rmtree(path)
    return [path.name for path in partial]


def remove_all_but(directory: Path, keep: int) -> None:
    """Remove the oldest checkpoints beyond `keep`."""
    for checkpoint in list_checkpoints(directory)[:-keep]:
        remove(checkpoint)


def _size_and_sum(file: Path) -> list[int]:
    size = total = 0
    with open(file, "rb") as opened:
        while block := opened.read(BLOCK):
            size, total = size + len(block), zlib.crc32(block, total)
    return [size, total]


def _write_flushed(file: Path, text: str) -> None:
    with open(file, "w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: CheckpointException) -> OSError:
    """What the system said, below what torch makes of it."""
    first = cause = next(iter(error.failures.values()))[0]
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or OSError(f"{type(first).__name__}: {first}")
