"""How many bytes a stretch of code holds at the most: as torch's allocator counts them, or of the tensors that operations made."""

from __future__ import annotations

import weakref

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def most_held(run) -> int:
    """Bytes that torch's allocator gave out and had not taken back, at the most, while `run` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for _, size in sorted(events):
        held += size
        most = max(most, held)
    return most


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live; `most` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in made(out, args, kwargs):
            storage = tensor.untyped_storage()
            if storage not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, nbytes: int) -> None:
        self.now -= nbytes


def made(out, args, kwargs) -> list[torch.Tensor]:
    """Tensors of what an operation gave out that are no views of what it was given."""
    tensors, given = ([x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in (out, (args, kwargs)))
    known = {x.untyped_storage()._cdata for x in given}
    return [x for x in tensors if x.untyped_storage()._cdata not in known]
