"""The planner: predicts what a streamed step will hold, and finds the fastest plan that fits a budget."""

from longtrain.planner.cost import peak, step_memory
from longtrain.planner.footprint import measure_model
from longtrain.planner.search import plan

__all__ = ["measure_model", "peak", "plan", "step_memory"]
