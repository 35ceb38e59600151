"""How a sequence is spread over processes, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longtrain.parallel.layout import ARRANGEMENTS

WAYS = ("ring", "queries", "halo")
"""How groups of ranks that hold different tokens bring queries and keys together: keys go round, in two passes over the sequence;
queries go round, chunk by chunk; or each chunk fetches what its windows reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How a sequence is spread over the processes of a group. Raises ValueError naming the setting that is wrong."""

    layout: Literal["auto", "contiguous", "zigzag", "striped"] = "auto"
    """Which tokens of each chunk a rank holds; `auto`: contiguous where heads are exchanged over all ranks, striped otherwise."""

    way: Literal["auto", "heads", "ring", "queries", "halo"] = "auto"
    """How ranks that hold different tokens bring queries and keys together; `auto`: by fewest bytes, for each layer. `heads`: by exchanges of
    heads alone."""

    heads: int | None = None
    """Neighbours that exchange heads; None: as many as there are ranks, or fewer where there are not so many query heads."""

    gradients: Literal["mean", "sum"] = "mean"
    """What is done with the gradients of several processes afterwards: DDP and FSDP2 take the mean."""

    stripe: int | None = None
    """Tokens of a stripe at least; None: as long as the work stays balanced to a sixteenth."""

    def __post_init__(self) -> None:
        choices = {"layout": ("auto", *ARRANGEMENTS), "way": ("auto", "heads", *WAYS), "gradients": ("mean", "sum")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"parallel.{name} must be one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        for name in ("heads", "stripe"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"parallel.{name} must be an integer of at least 1, found {value!r}")
