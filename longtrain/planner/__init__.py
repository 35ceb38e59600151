"""The planner: predicts what a streamed step will hold, and finds the fastest plan that fits a budget."""

from longtrain.planner.cost import measure_model, peak, step_memory
from longtrain.planner.search import plan

__all__ = ["measure_model", "peak", "plan", "step_memory"]
