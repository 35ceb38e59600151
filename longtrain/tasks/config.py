"""What a task's YAML file may say: the settings, without sections."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal

from yaml import MappingNode

from longtrain.config.bounds import above_zero, at_least, between
from longtrain.config.nodes import COMMAND_LINE, ConfigError, Locations, compose, entries_of, read_text
from longtrain.config.values import Reader
from longtrain.nn.filters import LARGEST_SQUASH


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """A comparison: one model on one task, with each filter setting and from each seed."""

    task: Literal["listops", "pathfinder", "digits"]
    """Which task."""

    tokens: int
    """Tokens of a sequence, at most."""

    noise: int = 0
    """Random tokens before and behind each sequence, which begins anywhere among them; only for images."""

    train_examples: int
    """Sequences to learn from."""

    test_examples: int
    """Other sequences, to measure with."""

    measure_on: Literal["test", "validation"] = "test"
    """`validation`: measure with as many sequences that are in neither set, to choose settings by."""

    width: int
    """Features of a token, E."""

    layers: int
    """Layers, each a long convolution over the whole sequence and a gated linear unit."""

    dropout: float = 0.0
    """Share of the features that are dropped behind each layer."""

    center: bool = True
    """Whether a layer convolves what differs from the sequence's mean. An image's background comes out of a filter as the sum of its
    taps."""

    squash: tuple[float, ...] = (0.003, 0.0)
    """Soft thresholds of the filters to compare, the first one with the others; 0 is none."""

    init: Literal["decay", "normal"] = "decay"
    """How the filters begin: `decay`, from one token to the whole sequence over the channels; `normal`: as large everywhere."""

    init_std: float = 0.02
    """Standard deviation of the filters' taps at the start."""

    smooth: int = 1
    """Neighbouring taps whose mean a tap becomes; 1 is none."""

    steps: int
    """Updates."""

    batch: int
    """Sequences an update."""

    lr: float = 3e-3
    """Learning rate, falling along half a cosine."""

    filter_lr: float | None = None
    """That of the filters; `lr` when not given."""

    weight_decay: float = 0.05
    """AdamW's, on matrices."""

    measure_every: int = 100
    """Updates between two measurements on the test examples."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws a model and an order of the examples; the examples themselves are the same."""

    threads: int | None = None
    """CPU threads; null for PyTorch's own choice."""

    out: str
    """Directory for metrics and plot; what stood there is replaced."""

    def __post_init__(self) -> None:
        for name in ("train_examples", "test_examples", "width", "layers", "steps", "batch", "measure_every"):
            at_least(name, getattr(self, name), 1)
        at_least("tokens", self.tokens, 8)
        at_least("noise", self.noise, 0)
        if self.noise and self.task == "listops":
            raise ValueError("noise: is for images, random tokens around an expression would be another one; leave it out")
        above_zero("lr", self.lr)
        for name in ("squash", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: must list different values, found {list(values)}; name at least one")
        above_zero("init_std", self.init_std)
        for squash in self.squash:
            between("squash", squash, 0, LARGEST_SQUASH * self.init_std)
        if self.smooth < 1 or self.smooth % 2 == 0:
            raise ValueError(f"smooth: must be an odd number of taps, found {self.smooth}; 1 is none")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: must be from 0 to below 1, found {self.dropout:g}; 0.1 is usual")
        if self.batch > self.train_examples:
            raise ValueError(f"batch: {self.batch} is more than the {self.train_examples} train_examples; lower it")


def load_task_config(path: str | Path, overrides: Sequence[str] = ()) -> TaskConfig:
    """Read `path` and apply ``setting=value`` overrides in order. Raises ConfigError, as `longtrain.config.load_config` does."""
    file, lines = str(path), {}
    where, known, hints = Locations(file, lines), [f.name for f in fields(TaskConfig)], typing.get_type_hints(TaskConfig)
    root = compose(read_text(file), "config", lambda mark: f"{file}:{mark.line + 1}")
    if not isinstance(root, MappingNode):
        raise where.error("config", f"must hold settings such as `task: listops`; they are {', '.join(known)}")
    entries = entries_of(root, "", known, where, lines)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or name not in known:
            raise ConfigError(COMMAND_LINE, override, f"is not setting=value; the settings are {', '.join(known)}")
        entries[name], lines[name] = compose(text or "null", name, lambda mark: COMMAND_LINE), COMMAND_LINE
    reader = Reader(where, lines)
    values = {name: reader.value(name, hints[name], node) for name, node in entries.items()}
    for f in fields(TaskConfig):
        if f.name not in values and f.default is MISSING:
            raise where.error(f.name, f"is missing; add `{f.name}: ...`")
    try:
        return TaskConfig(**values)
    except ValueError as error:
        name, _, problem = str(error).partition(": ")
        raise where.error(name, problem) from None
