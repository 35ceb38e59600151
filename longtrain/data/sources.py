"""Documents as bytes: the running Python's standard library, or text files; and the split into training and validation."""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VOCABULARY = 256
"""Every byte is a token; there are no others."""

_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class DataError(Exception):
    """The data cannot be trained on; the message says which part and what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """One document: where it came from and its tokens ``[n]``, uint8."""

    name: str
    tokens: np.ndarray


def read_stdlib(root: Path | None = None) -> list[Document]:
    """The standard library's modules in the order of their names, without its tests (which not every Python has)."""
    root = root or Path(sysconfig.get_path("stdlib"))
    paths = [p for p in root.rglob("*.py") if not _NOT_STDLIB & set(p.relative_to(root).parts[:-1])]
    documents = list(_read(sorted(paths, key=lambda p: p.relative_to(root).as_posix()), root))
    if not documents:
        raise DataError(
            f"data.source: stdlib found no Python source under {root} (some builds keep it in a zip file); "
            "use another Python, or source: text with files of your own"
        )
    return documents


def read_text(patterns: Sequence[str]) -> list[Document]:
    """Each file that the patterns (paths, directories, globs) name, once, in the order of their paths."""
    paths: set[Path] = set()
    for pattern in patterns:
        directory = Path(pattern)
        if directory.is_dir():
            found = {p for p in directory.rglob("*") if p.is_file()}
        else:
            found = {Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()}
        if not found:
            raise DataError(f"data.files: {pattern} names no file (from {Path.cwd()}); correct the path or the pattern")
        paths |= found
    documents = list(_read(sorted(paths), None))
    if not documents:
        raise DataError(f"data.files: the {len(paths)} files that {', '.join(patterns)} names are all empty; name files with text")
    return documents


def _read(paths: Sequence[Path], root: Path | None) -> Iterator[Document]:
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); make it readable, or leave it out of data.files") from error
        if content:
            name = path.relative_to(root).as_posix() if root else str(path)
            yield Document(name, np.frombuffer(content, dtype=np.uint8))


def split_documents(
    documents: Sequence[Document], validation_fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, each in the order given: whole documents are drawn until the fraction is reached."""
    if len(documents) < 2:
        raise DataError(
            f"the data is one document ({documents[0].name}), so none can be held out for validation; give at least two files"
        )
    wanted = validation_fraction * sum(len(d.tokens) for d in documents)
    held_out: set[int] = set()
    size = 0
    for index in np.random.default_rng([seed, 0]).permutation(len(documents)):
        if size >= wanted or len(held_out) == len(documents) - 1:
            break
        held_out.add(int(index))
        size += len(documents[index].tokens)
    return (
        [d for i, d in enumerate(documents) if i not in held_out],
        [d for i, d in enumerate(documents) if i in held_out],
    )


def check_vocabulary(documents: Sequence[Document], vocab_size: int) -> None:
    """Raise DataError naming the first token that the model has no embedding for, and its position."""
    for document in documents:
        outside = document.tokens >= vocab_size
        if outside.any():
            position = int(outside.argmax())
            raise DataError(
                f"{document.name}: token id {document.tokens[position]} at position {position} is outside the vocabulary of "
                f"{vocab_size}; set model.vocab_size to at least {int(document.tokens.max()) + 1}"
            )
