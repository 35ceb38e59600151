"""Offload what autograd saves, for modules that are not streamed: any forward, under a context manager.

Every tensor that autograd saves and that is large enough goes to the store; unpacked, it comes back. What SSDTrain does
(arXiv:2408.10013), with three differences: equal bytes are told by storage, offset and version, so that views of one projection are
not taken for each other; the hooks' gap in autograd's version check is closed; and the order of the way back is a hint, never relied on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from longtrain.offload.place import DiskSettings, Place
from longtrain.offload.store import Stored, edited, version_of
from longtrain.offload.tiered import TieredStore
from longtrain.span import Span

_ONE = Span(0, 1)


@dataclass(frozen=True, slots=True)
class _Here:
    """A tensor that stays where it is."""

    tensor: Tensor
    version: int


@contextmanager
def saved_tensors(
    store: TieredStore | DiskSettings,
    *,
    place: Place = Place(tier="disk"),
    min_bytes: int = 1 << 20,
    exclude: Iterable[Tensor] = (),
) -> Iterator[TieredStore]:
    """Within it, tensors of at least `min_bytes` that autograd saves go to `place`, and come back in the backward pass.

        with lt.offload.saved_tensors(lt.offload.DiskSettings(path="/scratch", budget=100 << 30)):
            loss = model(x).sum()
        loss.backward()

    Not taken: parameters and other leaves that require gradients and their views, views of what is listed in `exclude`, and tensors of
    another device than the store's. Gives the store, made where settings for one are given. `place` with compress is lossy.

    Raises RuntimeError in the backward pass where a tensor was edited in place before it was safely away (after that, the value that
    was saved is used), or where it cannot be read back.
    """
    if isinstance(store, DiskSettings):
        store = TieredStore("cuda" if torch.cuda.is_available() else "cpu", disk=store)
    excluded = {tensor.untyped_storage()._cdata for tensor in exclude}
    number, packed, announced = count(), [], False

    def pack(tensor: Tensor) -> Stored | _Here | Tensor:
        base = tensor if tensor._base is None else tensor._base
        if base.is_leaf and base.requires_grad:
            return tensor
        ours = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.device.type == store.device.type
        if not ours or tensor.nbytes < min_bytes or tensor.untyped_storage()._cdata in excluded:
            return _Here(tensor.detach(), version_of(tensor))  # detached: a saved output would hold the graph that holds it
        stored = Stored(store, f"saved tensor {next(number)} {list(tensor.shape)}", lambda span: place)
        stored.put(_ONE, tensor.detach()[None, None])
        packed.append(stored.name)
        return stored

    def unpack(saved: Stored | _Here | Tensor) -> Tensor:
        nonlocal announced
        if isinstance(saved, Tensor):
            return saved
        if isinstance(saved, _Here):
            if version_of(saved.tensor) != saved.version:
                raise RuntimeError(edited(f"a saved tensor {list(saved.tensor.shape)}"))
            return saved.tensor
        if not announced:
            announced = True
            store.prefetch((name, _ONE) for name in reversed(packed))
        return saved.get(_ONE)[0, 0]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield store
