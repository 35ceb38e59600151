"""What a build reads: the files of its inputs, their documents part by part from any place on, and as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longtrain.data import formats
from longtrain.data.chat import read_chat
from longtrain.data.corpus import KEY_BYTES, content_key
from longtrain.data.formats import LeftOut, Part
from longtrain.data.sources import find_files
from longtrain.data.tokenize import Encode

BATCH_BYTES, BATCH_DOCUMENTS = 2**22, 256
"""What is given to a tokenizer at a time."""
READERS = {**formats.READERS, "chat": read_chat}


@dataclass(frozen=True, slots=True)
class Input:
    """A file to read, as `inputs.json` keeps it."""

    path: str
    bytes: int
    changed_ns: int
    input: int
    """Which of the inputs given it belongs to."""


def list_files(inputs: Sequence[str], out: Path) -> list[Input]:
    """The files of every input in the order of their paths, each once, without those of `out` itself."""
    files: dict[str, Input] = {}
    for index, pattern in enumerate(inputs):
        for path in sorted(find_files(pattern)):
            if out.resolve() not in path.resolve().parents:
                about = path.stat()
                files.setdefault(str(path), Input(str(path), about.st_size, about.st_mtime_ns, index))
    return list(files.values())


def read_parts(files: Sequence[Input], kinds: Sequence[str], at: Sequence[int], options: dict) -> Iterator[tuple[int, Part | LeftOut]]:
    """Parts of all files from ``at = (file, offset, number)`` on, each with the number of its file, the last of a document with its key."""
    for index in range(at[0], len(files)):
        offset, number = at[1:] if index == at[0] else (0, 0)
        begins, size = b"", 0
        try:
            for part in READERS[kinds[index]](Path(files[index].path), offset, number, options):
                if isinstance(part, LeftOut):
                    begins, size = b"", 0
                else:
                    begins, size = begins + part.content[: KEY_BYTES - len(begins)], size + len(part.content)
                    if part.last:
                        part = Part(*part[:-1], content_key(begins, size))
                        begins, size = b"", 0
                yield index, part
        except OSError as error:
            why = f"{files[index].path} cannot be read ({error.strerror}); make it readable, or leave it out"
            yield index, LeftOut(why, files[index].bytes, number)


def encode_documents(events: Iterator[tuple[int, Part | LeftOut]], encode: Encode) -> Iterator[tuple[int, Part | LeftOut]]:
    """The same events in the same order with whole documents, and tokens for text. The tokenizer is given many at a time."""
    parts: list[bytes] = []
    waiting: list[tuple[int, Part | LeftOut]] = []
    size = 0

    def encoded() -> Iterator[tuple[int, Part | LeftOut]]:
        made = iter(encode([(part.content.decode("utf-8"), part.learned) for _, part in waiting if isinstance(part, Part)]))
        for index, part in waiting:
            if isinstance(part, Part):
                tokens, learned = next(made)
                part = part._replace(content=tokens, learned=learned)
                if learned is not None and not learned:
                    part = LeftOut(f"{part.name} has an answer of no token; correct the line", part.offset, part.number)
            yield index, part

    for index, part in events:
        if isinstance(part, Part):
            parts.append(part.content)
            size += len(part.content)
            if not part.last:
                continue
            part = part._replace(content=b"".join(parts))
        parts.clear()
        waiting.append((index, part))
        if size >= BATCH_BYTES or len(waiting) >= BATCH_DOCUMENTS:
            yield from encoded()
            waiting.clear()
            size = 0
    yield from encoded()
