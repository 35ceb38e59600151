"""When a checkpoint is due, that there is room for it, and writing it while training goes on."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from longtrain.config.run import CheckpointConfig
from longtrain.errors import RunError
from longtrain.files import said_plainly
from longtrain.train.checkpoint import list_checkpoints, path_of, remove_all_but, write_checkpoint
from longtrain.train.processes import ALONE, Processes
from longtrain.units import format_bytes

ROOM = 1.05
"""Bytes of a checkpoint's files beside its tensors': names, headers, the configuration."""
ROOM_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint that stands: `seconds` from its beginning to its last file on disk."""

    step: int
    bytes: int
    seconds: float


class Saver:
    """Writes checkpoints into `directory`, one at a time; the last one is awaited before the next begins, and by `finish`.

    Several processes write one together: all of them call `save` for the same steps.
    """

    def __init__(
        self, directory: Path, config: CheckpointConfig, processes: Processes = ALONE, before_print: Callable[[], None] = lambda: None
    ) -> None:
        """`before_print`: what makes room for a line, where a bar is drawn meanwhile."""
        self.directory, self.config, self.processes, self.before_print = directory, config, processes, before_print
        self.last_step = max((int(c.name.rpartition("-")[2]) for c in list_checkpoints(directory)), default=0)
        self.last_time = time.monotonic()
        self.thread: threading.Thread | None = None
        self.outcome: Saved | BaseException | None = None

    def check_room_ahead(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise RunError unless the checkpoints that are kept, and one more beside them, fit on the disk."""
        copies = self.config.keep + 1 - len(list_checkpoints(self.directory))
        if self.processes.rank == 0:
            check_room(self.directory.parent, sum(t.nbytes for t in tensors.values()), copies)

    def due(self, step: int, last: bool) -> bool:
        """Whether the state after `step` updates is to be saved now."""
        if step <= self.last_step:
            return False
        every, minutes = self.config.every_steps, self.config.every_minutes
        waited = time.monotonic() - self.last_time
        return last or (every is not None and step % every == 0) or (minutes is not None and waited >= 60 * minutes)

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping, config: str) -> Saved | None:
        """Begin to write; returns the checkpoint before, if it was still being written. Asynchronous: `tensors` may be changed as
        soon as this returns, for they were copied to host memory before.
        """
        before = self.finish()
        size = sum(t.nbytes for t in tensors.values())
        if self.processes.rank == 0:
            check_room(self.directory.parent, size)
        began = time.monotonic()
        if self.config.asynchronous:
            tensors = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        self._print(f"checkpoint of step {step} begins, {format_bytes(size)}")
        self.last_step = step
        arguments = (step, tensors, facts, config, began)
        if self.config.asynchronous:
            self.thread = threading.Thread(target=self._write, args=arguments, name=f"checkpoint of step {step}")
            self.thread.start()
        else:
            self._write(*arguments)
        return before

    def _print(self, line: str) -> None:
        self.before_print()
        print(line, flush=True)

    def collect(self) -> Saved | None:
        """What was written since the last call, once. Raises RunError if it could not be."""
        if self.thread is not None and self.thread.is_alive():
            return None
        self.thread, outcome, self.outcome = None, self.outcome, None
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def finish(self) -> Saved | None:
        """Wait for what is being written, then `collect`."""
        if self.thread is not None:
            self.thread.join()
        return self.collect()

    def _write(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping, config: str, began: float) -> None:
        try:
            with said_plainly(path_of(self.directory, step)):
                size = write_checkpoint(path_of(self.directory, step), tensors, facts, config, self.processes.saving)
                if self.processes.rank == 0:
                    remove_all_but(self.directory, self.config.keep)
        except BaseException as error:  # raised again where the run waits for it
            self.outcome = error
            return
        self.last_time = time.monotonic()
        seconds = self.last_time - began
        self._print(f"checkpoint of step {step} stands, {format_bytes(size)} in {seconds:.1f} s")
        self.outcome = Saved(step=step, bytes=size, seconds=seconds)


def check_room(directory: Path, size: int, copies: int = 1) -> None:
    """Raise RunError unless `copies` more checkpoints of `size` bytes fit on the disk of `directory`."""
    free, needed = shutil.disk_usage(directory).free, round(copies * (size * ROOM + ROOM_BYTES))
    if free < needed:
        raise RunError(
            f"{directory}: {format_bytes(free)} are free and {copies} more checkpoints of {format_bytes(size)} need "
            f"{format_bytes(needed)}; "
            "make room, lower checkpoint.keep, or set output.dir to another disk"
        )
