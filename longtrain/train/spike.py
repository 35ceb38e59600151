"""The loss-spike guard: an update whose loss jumps is left out, or ends the run."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from longtrain.config.run import SpikeConfig

MOST_IN_A_ROW = 10
"""Spikes one after another; one more is no spike but the level the loss now has."""


class SpikeGuard:
    """Knows the last losses of this length. A spike's loss is not among them."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.restore({"seq_len": 0, "losses": [], "in_a_row": 0})

    def state(self) -> dict:
        """Plain values for a checkpoint; `restore` takes them."""
        return {"seq_len": self.seq_len, "losses": list(self.losses), "in_a_row": self.in_a_row}

    def restore(self, state: dict) -> None:
        self.seq_len, self.in_a_row = state["seq_len"], state["in_a_row"]
        self.losses = deque(state["losses"], maxlen=self.config.window)

    def spike(self, loss: float, seq_len: int) -> str | None:
        """Why `loss` is a spike, or None; the loss is then one of the usual ones."""
        if seq_len != self.seq_len:
            self.seq_len = seq_len
            self.losses.clear()
        usual = median(self.losses) if len(self.losses) == self.config.window else None
        high = usual is not None and loss > self.config.threshold * usual
        if self.config.action != "none" and (high or not math.isfinite(loss)):
            self.in_a_row += 1
            times = f"{loss / usual:.1f} times the" if usual else "above a zero"
            return f"loss {loss:.4f}" + (f", {times} median of {len(self.losses)}" if high else "")
        self.in_a_row = 0
        self.losses.append(loss)
        return None

    def skips(self) -> bool:
        """Whether a spike just found is left out; otherwise it ends the run."""
        return self.config.action == "skip" and self.in_a_row <= MOST_IN_A_ROW
