"""Loads the compiled extension (`csrc/`), or tells why it is not there."""

from __future__ import annotations

from pathlib import Path

import torch


def _load() -> str | None:
    found = sorted(Path(__file__).parent.glob("_C*.so"))
    if not found:
        return (
            "the C++ extension was not built; install a C++ compiler and run "
            "`pip install -e . --no-build-isolation` in the repository"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load with torch {torch.__version__} ({error}); build it again"
    return None


MISSING: str | None = _load()
"""None if the extension is loaded, else why not and what to do."""
