"""Tiny models of any family: built, batched and compared as `tools/hf_families.py` does it for the table in the docs."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason='needs pip install "longtrain[hf]"')
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
