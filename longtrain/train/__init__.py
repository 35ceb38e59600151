"""The training driver: `run(config, where)` trains one model as its configuration says. Read `loop.py` first."""

from longtrain.train.loop import run
from longtrain.train.output import RunError

__all__ = ["RunError", "run"]
