"""Models that `fully_shard` has cut up already: the whole parameters of one module at a time, for `lt.apply` to trace it and to prove it.

Gathering is a collective: every rank calls `lt.apply` on its part of the same model.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def units(model: nn.Module) -> list[nn.Module]:
    """The modules in it that `fully_shard` was called on; none where FSDP2 was never imported."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def sharded_parameter(module: nn.Module) -> str | None:
    """The first parameter that is a part of a whole one."""
    return next((name for name, p in module.named_parameters() if hasattr(p, "device_mesh")), None)


@contextmanager
def whole(module: nn.Module, model: nn.Module) -> Iterator[None]:
    """`module` of `model` with its parameters gathered. Raises ValueError where something else than `fully_shard` has sharded them."""
    gathered = []
    around = [unit for unit in units(model) if any(part is module for part in unit.modules()) and unit is not module]
    try:
        for unit in (*units(module), *reversed(around)):
            if sharded_parameter(module) is None:
                break
            unit.unshard()
            gathered.append(unit)
        if name := sharded_parameter(module):
            raise ValueError(
                f"its parameter {name} is sharded by something else than fully_shard; tensor-parallel modules cannot be streamed yet"
            )
        yield
    finally:
        for unit in gathered:
            unit.reshard()


def plain_copy(module: nn.Module) -> nn.Module:
    """A deep copy without the sharding (which refuses to be copied), for a module that is `whole`. Hooks on its units stay behind."""
    cut = units(module)
    memo = {id(unit): object.__new__(_class_before(unit)) for unit in cut}
    for unit in cut:
        copied = memo[id(unit)]
        nn.Module.__init__(copied)
        state = {name: value for name, value in vars(unit).items() if "_hooks" not in name and not name.startswith("__composable_api")}
        vars(copied).update(copy.deepcopy(state, memo))
    return copy.deepcopy(module, memo)


def _class_before(unit: nn.Module) -> type[nn.Module]:
    """fully_shard gives a module a class of its own, derived from the one it had."""
    from torch.distributed.fsdp import FSDPModule

    return next(c for c in type(unit).__mro__ if not issubclass(c, FSDPModule))
