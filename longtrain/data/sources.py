"""Where documents come from before they are packed: the running Python's standard library, or files that patterns name."""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
    paths = sorted(set().union(*(find_files(pattern, "data.files: ") for pattern in patterns)))
    documents = list(_read(paths, None))
    if not documents:
        raise DataError(f"data.files: the {len(paths)} files that {', '.join(patterns)} names are all empty; name files with text")
    return documents


def find_files(pattern: str, setting: str = "") -> set[Path]:
    """The file, every file below the directory, or the files of the glob that `pattern` is. Raises DataError where there are none."""
    if Path(pattern).is_dir():
        found = {p for p in Path(pattern).rglob("*") if p.is_file()}
    else:
        found = {Path(p) for p in (pattern, *glob.glob(pattern, recursive=True)) if Path(p).is_file()}
    if not found:
        raise DataError(f"{setting}{pattern} names no file (from {Path.cwd()}); correct the path or the pattern")
    return found


def _read(paths: Sequence[Path], root: Path | None) -> Iterator[Document]:
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); make it readable, or leave it out of data.files") from error
        if content:
            name = path.relative_to(root).as_posix() if root else str(path)
            yield Document(name, np.frombuffer(content, dtype=np.uint8))
