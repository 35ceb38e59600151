"""longtrain: exact, memory-bounded training on long sequences for PyTorch."""

from longtrain import backends, nn, ops
from longtrain.apply import Report, apply
from longtrain.logprobs import token_logprobs
from longtrain.plan import InfeasibleBudget, Plan
from longtrain.planner import plan

__version__ = "0.1.0"

__all__ = ["InfeasibleBudget", "Plan", "Report", "apply", "backends", "nn", "ops", "plan", "token_logprobs"]
