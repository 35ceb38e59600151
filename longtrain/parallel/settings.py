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
    """Which tokens of each chunk a rank holds; `auto`: striped, as heads are exchanged stripe by stripe, one while another is
    worked on; contiguous where all ranks exchange heads and a layer has a window, whose halo goes to each stripe."""

    way: Literal["auto", "heads", "ring", "queries", "halo"] = "auto"
    """How ranks that hold different tokens bring queries and keys together; `auto`: by fewest bytes, for each layer. `heads`: by
    exchanges of heads alone."""

    conv: Literal["auto", "halo", "channels"] = "auto"
    """How convolutions reach the tokens of other ranks: each chunk fetches what its filter reaches, or channels are exchanged over all
    ranks, in two passes; `auto`: by fewest bytes, for each layer."""

    states: Literal["auto", "heads", "scan"] = "auto"
    """How mixers with a state (linear attention, test-time training) go along the sequence: by exchanges of heads, or by a state that is
    handed from rank to rank; `auto`: by fewest bytes, for each layer, test-time training by heads where it can."""

    heads: int | None = None
    """Neighbours that exchange heads; None: as many as there are ranks, or fewer where there are not so many query heads."""

    machine: int | None = None
    """Neighbours that are tied together by faster links than all processes: rings turn inside of machines, and between them while they do.
    None: all links are alike."""

    gradients: Literal["mean", "sum"] = "mean"
    """What is done with the gradients of several processes afterwards: DDP and FSDP2 take the mean."""

    stripe: int | None = None
    """Tokens of a stripe at least; None: as long as the work stays balanced to a sixteenth, and where all ranks exchange heads, up to 8
    stripes of a chunk."""

    def __post_init__(self) -> None:
        choices = {"layout": ("auto", *ARRANGEMENTS), "way": ("auto", "heads", *WAYS), "gradients": ("mean", "sum")}
        choices |= {"conv": ("auto", "halo", "channels"), "states": ("auto", "heads", "scan")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"parallel.{name} must be one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        for name in ("heads", "machine", "stripe"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"parallel.{name} must be an integer of at least 1, found {value!r}")
