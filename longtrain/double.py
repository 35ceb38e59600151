"""float64 throughout, also where a model asks for float32 by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

BITS = (Tensor.view, torch.frombuffer)
"""Here a dtype says what given bytes are, not what is to be computed in."""


class InDouble(TorchFunctionMode):
    """Within it, float32 is float64: transformers' families compute norms, rotary angles, recurrences and the loss in float32 whatever the
    model's dtype, and that rounds what is compared. Python code alone sees it; a kernel that computes in float32 goes on doing so."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            return args[0].double()
        if func is Tensor.backward:
            with self:  # a mode is off in the functions that it calls, and replays are to have it
                seed = (torch.ones_like(args[0]),)
                return _engine_run_backward(args[:1], seed, False, False, (), allow_unreachable=True, accumulate_grad=True)
        if func in BITS:
            return func(*args, **kwargs)
        wider = lambda value: torch.float64 if value is torch.float32 else value
        return func(*map(wider, args), **{name: wider(value) for name, value in kwargs.items()})
