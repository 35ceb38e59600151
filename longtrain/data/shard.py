"""Writes one shard of built data: its tokens as they come, then the table of its documents, their names and what is learned from."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from io import RawIOBase
from pathlib import Path

import numpy as np

from longtrain.data.built import DOCUMENT

BUFFER_BYTES = 2**22


class ShardWriter:
    """Three files of one shard. Tokens are written a few MiB at a time, and taken back where a document turns out to be broken."""

    def __init__(self, out: Path, number: int, dtype: np.dtype, end_token: int | None) -> None:
        self.path, self.dtype, self.end_token = out / f"{number:05}", dtype, end_token
        self.rows: list[tuple[int, int, int, int]] = []
        self.tokens = 0
        self.learned: list[tuple[int, int]] = []
        self.names = bytearray()
        self.file = open(self.path.with_suffix(".tokens"), "wb", buffering=0)
        self.buffer = bytearray()
        self.begins = 0
        """Where in the buffer the open document begins; below 0 where some of it is in the file."""
        self.written, self.crc, self.largest = 0, 0, 0
        self.before = (0, 0, 0)
        """The line above, before the open document."""

    @property
    def bytes(self) -> int:
        return self.written + len(self.buffer)

    def write(self, tokens: bytes | np.ndarray) -> None:
        """More tokens of the open document."""
        if isinstance(tokens, bytes) and self.dtype.itemsize > 1:
            tokens = np.frombuffer(tokens, dtype=np.uint8)
        self.buffer += tokens if isinstance(tokens, bytes) else tokens.astype(self.dtype, copy=False).tobytes()
        if len(self.buffer) >= BUFFER_BYTES:
            self.flush()

    def end(self, name: str, key: int, number_of_input: int, learned: Sequence[tuple[int, int]] = ()) -> bool:
        """Close the open document; `learned`: ranges of its tokens. False where it holds nothing, and is not kept."""
        size = len(self.buffer) - self.begins
        if size and self.end_token is not None:
            self.buffer += np.array([self.end_token], dtype=self.dtype).tobytes()
            size += self.dtype.itemsize
        if size:
            self.names += name.encode("utf-8", "surrogateescape")
            self.rows.append((size // self.dtype.itemsize, len(self.names), key, number_of_input))
            self.learned += [(self.tokens + start, self.tokens + stop) for start, stop in learned]
            self.tokens += size // self.dtype.itemsize
        self.begins = len(self.buffer)
        return size > 0

    def discard(self) -> None:
        """Forget the open document."""
        if self.begins < 0:
            self.written, self.crc, self.largest = self.before
            self.file.seek(self.written)
            self.file.truncate()
            self.begins = 0
        del self.buffer[self.begins :]

    def flush(self) -> None:
        if self.begins >= 0:
            self._put(self.buffer[: self.begins])
            self.before = (self.written, self.crc, self.largest)
        self._put(self.buffer[max(self.begins, 0) :])
        self.begins = min(self.begins, 0) - (len(self.buffer) - max(self.begins, 0))
        self.buffer.clear()

    def _put(self, content: bytearray) -> None:
        if content:
            self.crc = zlib.crc32(content, self.crc)
            self.largest = max(self.largest, int(np.frombuffer(content, dtype=self.dtype).max()))
            self.written += len(content)
            write_all(self.file, content)

    def close(self) -> dict:
        """Put everything on disk; the shard as the manifest has it."""
        self.flush()
        with self.file:
            os.fsync(self.file.fileno())
        contents = {"documents": np.array(self.rows, dtype=DOCUMENT).tobytes(), "names": bytes(self.names)}
        if self.learned:
            contents["learned"] = np.array(self.learned, dtype="<i8").tobytes()
        for part, content in contents.items():
            with open(self.path.with_suffix(f".{part}"), "wb", buffering=0) as file:
                write_all(file, content)
                os.fsync(file.fileno())
        sizes = {"tokens": self.written} | {part: len(content) for part, content in contents.items()}
        sums = {"tokens": self.crc} | {part: zlib.crc32(content) for part, content in contents.items()}
        tokens = self.written // self.dtype.itemsize
        return {"name": self.path.name, "documents": len(self.rows), "tokens": tokens, "bytes": sizes, "crc32": sums}

    def remove(self) -> None:
        """Close a shard that holds nothing."""
        self.file.close()
        self.path.with_suffix(".tokens").unlink()


def write_all(file: RawIOBase, content: bytes | bytearray) -> None:
    """A full disk takes a part first, then says why."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]
