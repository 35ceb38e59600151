"""What a run prints: a line a step, a bar inside long steps, and the verdict."""

from __future__ import annotations

import math
import time
from typing import TextIO

from longtrain.data.baselines import Baselines
from longtrain.units import format_bytes, format_time

BAR_WIDTH = 30
REDRAW_SECONDS = 0.1


def step_line(
    step: int,
    steps: int,
    *,
    seq_len: int,
    loss: float,
    grad_norm: float,
    lr: float,
    tokens_per_second: float,
    mfu: float,
    peak_bytes: int,
    budget_bytes: int | None,
    eta_seconds: float,
) -> str:
    budget = f" of {format_bytes(budget_bytes)}" if budget_bytes else ""
    return (
        f"step {step:>{len(str(steps))}}/{steps}  T {seq_len}  loss {loss:.4f}  grad norm {grad_norm:.3f}  lr {lr:.2e}  "
        f"{tokens_per_second:,.0f} tokens/s  mfu {mfu:.1%}  peak {format_bytes(peak_bytes)}{budget}  ETA {format_time(eta_seconds)}"
    )


def verdict(validation_loss: float, targets: int, baselines: Baselines | None, unit: str = "byte") -> str:
    """The validation loss beside what counting achieves. Logarithms are natural; bits are those divided by ln 2. `unit`: what a token
    is."""
    if baselines is None:
        return f"validation loss  {validation_loss:.4f} nats a token, {targets:,} targets"
    better = validation_loss < baselines.bigram

    def beside(counted: float) -> str:
        return f"{abs(counted - validation_loss):.4f} {'below' if validation_loss < counted else 'above, that is, it is worse'}"

    lines = [
        f"validation loss  {validation_loss:.4f} nats a {unit} = {validation_loss / math.log(2):.3f} bits a {unit}, {targets:,} targets",
        f"bigram counts    {baselines.bigram:.4f} (add-{baselines.bigram_k:g}): the model is {beside(baselines.bigram)}",
        f"unigram counts   {baselines.unigram:.4f} (add-{baselines.unigram_k:g}): the model is {beside(baselines.unigram)}",
        f"verdict: {'it learned more than counting pairs can' if better else 'it has not yet learned what counting pairs can'}",
    ]
    return "\n".join(lines)


class StepBar:
    """A bar inside a step, redrawn in place on a terminal and absent elsewhere.

    It counts the spans that the streaming engine reports; how many a sequence of one length makes is known after the first.
    """

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.shown = out.isatty()
        self.spans_a_sequence: dict[int, int] = {}
        self.drawn_at = 0.0
        self.begin("", 0, 1)

    def begin(self, label: str, seq_len: int, sequences: int) -> None:
        self.label, self.seq_len, self.sequences = label, seq_len, sequences
        self.sequences_done = self.spans = 0

    def span_done(self, phase: str, done: int, total: int) -> None:
        """The engine's progress callback: spans of one phase of one segment."""
        self.spans += 1
        self._draw(f"{phase} {done}/{total}")

    def sequence_done(self) -> None:
        if self.spans:
            self.spans_a_sequence[self.seq_len] = self.spans
        self.sequences_done += 1
        self.spans = 0
        self._draw("")

    def clear(self) -> None:
        if self.shown:
            self.out.write("\r\x1b[K")
            self.out.flush()

    def _draw(self, note: str) -> None:
        now = time.monotonic()
        if not self.shown or now - self.drawn_at < REDRAW_SECONDS:
            return
        self.drawn_at = now
        known = self.spans_a_sequence.get(self.seq_len)
        share = min(1.0, (self.sequences_done + (self.spans / known if known else 0.0)) / self.sequences)
        filled = round(share * BAR_WIDTH)
        sequence = f"sequence {min(self.sequences_done + 1, self.sequences)}/{self.sequences}" if self.sequences > 1 else ""
        bar = f"{self.label} [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {share:4.0%}  {sequence}  {note}"
        self.out.write(f"\r{bar.rstrip()}\x1b[K")
        self.out.flush()
