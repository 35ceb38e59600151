"""Files that are whole or absent, and a plain word where one cannot be written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from longtrain.errors import RunError


@contextmanager
def said_plainly(path: Path) -> Iterator[None]:
    """Turn what the system says about writing `path` into a RunError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(
            f"{path} cannot be written ({reason}); make room or give permission there, or set output.dir to another place"
        ) from error


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: `path` is the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.partial")
    with said_plainly(path):
        try:
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
