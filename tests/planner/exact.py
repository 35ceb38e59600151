"""The planner's choice as an integer program: the least time there is, by scipy."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from longtrain.planner.placement import Problem


def least_seconds(problem: Problem) -> float | None:
    """Minimise sum over stretches of t with t >= compute and t >= transfer, one option an item, within the budgets; None: infeasible."""
    rows = [(i, o) for i, options in enumerate(problem.items) for o in options]
    stretches, n = len(problem.compute), len(rows)
    uses, compute, transfer = (np.array([getattr(o, name) for _, o in rows]).T for name in ("uses", "compute", "transfer"))
    limited = np.isfinite(problem.budgets)
    one_each = np.array([[float(i == item) for i, _ in rows] for item in range(len(problem.items))])
    # Bytes in units of each budget, so that the solver's tolerances are small ones.
    scale = np.maximum(problem.budgets[limited], 1.0)
    t, none = np.eye(stretches), np.zeros((limited.sum(), stretches))
    constraints = [
        LinearConstraint(np.hstack([one_each, np.zeros((len(one_each), stretches))]), 1, 1),
        LinearConstraint(np.hstack([uses[limited] / scale[:, None], none]), -np.inf, problem.budgets[limited] / scale),
        LinearConstraint(np.hstack([-compute, t]), problem.compute, np.inf),
        LinearConstraint(np.hstack([-transfer, t]), 0, np.inf),
    ]
    found = milp(
        np.concatenate([np.zeros(n), np.ones(stretches)]),
        constraints=constraints,
        integrality=np.concatenate([np.ones(n), np.zeros(stretches)]),
        bounds=Bounds(0, np.concatenate([np.ones(n), np.full(stretches, np.inf)])),
        options={"mip_rel_gap": 1e-6},
    )
    return None if found.x is None else float(found.fun)
