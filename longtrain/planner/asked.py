"""What a plan is wanted for, what the machine holds already, and the plans to begin a search from."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch

from longtrain.plan import Offload, Plan
from longtrain.planner.cost import Phase, peak, step_memory
from longtrain.planner.footprint import ModelFootprint
from longtrain.planner.rates import Rates
from longtrain.planner.tiers import tier_use

CHUNKS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SEGMENTS = (1, 2, 4, 8)
MOST_CHUNKS = 4096
"""Of a sequence: more cost more in launches than their size saves."""
FRACTIONS = tuple(i / 20 for i in range(21))


@dataclass(frozen=True, slots=True)
class Asked:
    """What a plan is wanted for."""

    model: ModelFootprint
    tokens: int
    batch: int
    tiers: Offload | None
    rates: Rates
    steps: int
    devices: int = 1
    """That share every sequence: `model` and `tokens` are what one of them has."""

    @property
    def may_write(self) -> float:
        """Bytes a step."""
        disk = None if self.tiers is None else self.tiers.disk
        return inf if disk is None or disk.max_written is None else disk.max_written / self.steps

    def memory(self, plan: Plan) -> list[Phase]:
        """By phase, as a budget must allow for it."""
        return step_memory(self.model, plan, self.tokens, self.batch, slow_tiers=True)

    def peak(self, plan: Plan) -> int:
        return peak(self.memory(plan)).total

    def peak_of(self, plan: Plan, *, only: str) -> int:
        """Of one phase; 0 where there is none of this name."""
        return max((p.total for p in self.memory(plan) if p.name == only), default=0)

    def fits_tiers(self, plan: Plan) -> bool:
        if plan.offload is None:
            return True
        use = tier_use(self.model, plan, self.tokens, self.batch)
        room = 0 if self.tiers.disk is None else self.tiers.disk.budget
        return use["host"].held <= self.tiers.host_bytes and use["disk"].held <= room and use["disk"].written <= self.may_write


def candidates(model: ModelFootprint, tokens: int) -> list[Plan]:
    # A segment of several layers stores fewer inputs; its layers must all be causal, and be given the same.
    chunks = [c for c in CHUNKS if c < tokens and c * MOST_CHUNKS >= tokens] or [min(tokens, CHUNKS[-1])]
    alone = {chunk: not (model.alike and all(f.causal for f in model.at(chunk))) for chunk in chunks}
    segments = [k for k in SEGMENTS if k <= len(model.layers)]
    keeps = (0.0, 1.0) if any(f.carry and f.causal for f in model.layers) else (0.0,)
    return [
        Plan(chunk_tokens=c, store_outputs=0.0, store_kv=kv, segment_layers=k)
        for k in segments for c in chunks for kv in keeps if k == 1 or not alone[c]
    ]  # fmt: skip


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What an optimizer's state takes now."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))


def held_beside_model(model: ModelFootprint, counted: int = 0) -> int:
    """Bytes the device holds now that are not the model's parameters, nor `counted` in its footprint (gradients, optimizer state): what is
    taken before the step begins."""
    if model.device.type == "cuda":
        return max(0, torch.cuda.memory_allocated(model.device) - model.parameters - counted)
    status = Path("/proc/self/status")
    if model.device.type != "cpu" or not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return max(0, int(line.split()[1]) * 1024 - model.parameters - counted)
