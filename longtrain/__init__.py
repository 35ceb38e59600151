"""longtrain: exact, memory-bounded training on long sequences for PyTorch."""

from longtrain import backends, nn, offload, ops
from longtrain.apply import Report, apply
from longtrain.logprobs import token_logprobs
from longtrain.memory import profile
from longtrain.offload import DiskSettings
from longtrain.parallel.settings import Parallel
from longtrain.plan import InfeasibleBudget, Offload, Plan, Split
from longtrain.planner import plan

__version__ = "0.1.0"

__all__ = [
    "DiskSettings", "InfeasibleBudget", "Offload", "Parallel", "Plan", "Report", "Split", "apply", "backends", "nn", "offload", "ops",
    "plan", "profile", "token_logprobs",
]
