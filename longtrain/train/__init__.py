"""The training driver: `run(config, where)` trains one model as its configuration says. Read `loop.py` first."""

from longtrain.errors import RunError
from longtrain.train.loop import run

__all__ = ["RunError", "run"]
