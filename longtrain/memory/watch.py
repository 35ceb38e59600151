"""Watches a program while it runs: which module, phase and operation memory was taken in, and which blocks hold what.

It only writes down; `ledger.py` makes sense of it afterwards. Everything is attached through torch's public hooks (modules, optimizers,
gradients) and, in a complete profile, a `TorchDispatchMode` that sees every operation; all of it is taken off again by `stop`.
"""

from __future__ import annotations

import gc
import sys
import time
import weakref
from array import array
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtrain.memory.sample import Sampler
from longtrain.memory.trace import AllocatorTrace, StorageTrace, storage_of
from longtrain.offload import DeviceStore, TieredStore
from longtrain.stream.segment import is_streamed

ENTER, LEAVE, BACKWARD, REACH, BACKWARD_END, OPTIMIZER, OPTIMIZER_END, STEP = range(8)
"""Kinds of marks; the second number of ENTER, LEAVE and REACH is a module."""

OWN = str(Path(__file__).parent)
LIBRARY = str(Path(torch.__file__).parent)


class Watch:
    """What was seen. Module 0 is none at all."""

    def __init__(self, trace: AllocatorTrace | StorageTrace, sampler: Sampler) -> None:
        self.trace, self.sampler = trace, sampler
        self.marks = array("q")
        """(kind, module, nanoseconds, events before) of each."""
        self.operations = array("q")
        """(events before, events after, site) of each operation that took or gave back memory."""
        self.sites: dict[tuple, int] = {}
        """(operation, file, line, function, ((bytes, shape, dtype) of what it gave out, ...)) by number."""
        self.labels: dict[tuple[str, str], int] = {}
        """(category, name) by number."""
        self.labelled = array("q")
        """(events before, address, bytes, device, label) of blocks whose content was recognised."""
        self.transfers = array("q")
        """(start, end nanoseconds, bytes, site) of collective communication."""
        self.modules: list[str] = [""]
        self.bands: set[int] = set()
        """Modules that are a step's visible parts: layers, embedding, norm, head."""
        self.streamed = False
        """Whether a model was called whose layers are streamed."""
        self.at_start: list[tuple[int, int, int, str]] = []
        """(address, bytes, device, shape) of the storages that were there before, where the trace does not tell of them."""
        self.first = 0
        """The first event that is not of a storage that was there before."""
        self.raised = 0
        """The innermost of the modules that an exception is leaving."""
        self.in_backward = False
        self._known: dict[int, tuple[weakref.ref, int]] = {}
        self._roots: list[weakref.ref] = []
        self._optimizers: dict[int, weakref.ref] = {}
        self._stack: list[int] = []
        self._handles: list[Any] = []
        self._extents: set[tuple] = set()

    # --- beginning and end ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        seen = set()
        for tensor in _living_tensors():
            if (found := storage_of(tensor)) is not None and found[1] not in seen:
                seen.add(found[1])
                if isinstance(self.trace, StorageTrace):
                    self.trace.saw(tensor)
                else:
                    self.at_start.append((*found[1:], f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"))
        if self.sampler.device.type == "cuda" and isinstance(self.trace, AllocatorTrace):  # what only libraries hold: cuBLAS' workspaces
            index = self.sampler.device.index
            hidden = torch.cuda.memory_allocated(self.sampler.device) - sum(n for _, n, device, _ in self.at_start if device == index)
            if hidden > 0:
                self.at_start.append((-1, hidden, index, "not found"))
        self.first = self.trace.count
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, with_kwargs=True, always_call=True),
            register_optimizer_step_pre_hook(self._optimizer_begins),
            register_optimizer_step_post_hook(self._optimizer_ends),
        ]
        self.sampler.start()

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.sampler.stop()
        self.recognise()

    def mark(self, kind: int, module: int = 0) -> None:
        self.marks.extend((kind, module, time.perf_counter_ns(), self.trace.count))

    # --- modules and phases --------------------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple) -> None:
        number, self.raised = self._number(module), 0
        if not self._stack and self.in_backward and torch._C._current_autograd_node() is None:
            self._backward_ends()  # it raised, and somebody caught that
        if not self._stack and not self.in_backward:
            self._extents.clear()
            self.recognise()
            self.mark(STEP)
        self._stack.append(number)
        self.mark(ENTER, number)

    def _leave(self, module: nn.Module, args: tuple, *rest: Any) -> None:
        # `rest` is (keyword arguments, output); torch leaves the former out when the module has raised.
        kwargs, output = rest if len(rest) == 2 else ({}, None)
        number = self._number(module)
        self.raised = 0 if len(rest) == 2 else self.raised or number
        while self._stack and self._stack.pop() != number:  # those that an exception left
            pass
        self.mark(LEAVE, number)
        if not self._stack and not self.in_backward:
            for tensor in tensors_in((args, kwargs)):
                self.label(tensor, "data", "model input")
        if self.in_backward or not torch.is_grad_enabled() or (self._stack and number not in self.bands):
            return
        for tensor in tensors_in(output):
            if tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(partial(self._gradient_reaches, number if number in self.bands else 0))

    def _gradient_reaches(self, number: int, _: Tensor) -> None:
        if self._stack and not self.in_backward:
            return  # a forward pass that differentiates within itself, as the streamed loss does
        self.backward_begins()
        if number:
            self.mark(REACH, number)
            self._label_stores()

    def backward_begins(self) -> None:
        """Called inside a backward pass: the first call marks its begin, and its end when it comes."""
        if not self.in_backward:
            self.in_backward = True
            self.mark(BACKWARD)
            Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_ends(self) -> None:
        self.in_backward = False
        self._stack.clear()
        self.mark(BACKWARD_END)
        self.recognise()

    def _optimizer_begins(self, optimizer: Optimizer, *_: Any) -> None:
        self._optimizers[id(optimizer)] = weakref.ref(optimizer)
        self.recognise()
        self.mark(OPTIMIZER)

    def _optimizer_ends(self, optimizer: Optimizer, *_: Any) -> None:
        self.mark(OPTIMIZER_END)
        self.recognise()

    def _number(self, module: nn.Module) -> int:
        known = self._known.get(id(module))
        if known is not None and known[0]() is module:
            return known[1]
        for child in module._modules.values():  # a wrapper around what is known (DDP, a replay of a streamed layer) counts as that
            known = self._known.get(id(child))
            if known is not None and known[0]() is child:
                return known[1]
        return self._adopt(module)

    def _adopt(self, root: nn.Module) -> int:
        """Take in a model that is called for the first time."""
        prefix = f"{type(root).__name__}." if self._roots else ""
        bands = set(map(id, visible_parts(root)))
        for name, module in root.named_modules():
            self.streamed |= is_streamed(module)
            self._known[id(module)] = weakref.ref(module), len(self.modules)
            if id(module) in bands:
                self.bands.add(len(self.modules))
            self.modules.append(prefix + name or type(root).__name__)
        if not self._stack:
            self._roots.append(weakref.ref(root))
            self.sampler.stores = [o for o in gc.get_objects() if issubclass(type(o), (DeviceStore, TieredStore))]
        return self._known[id(root)][1]

    # --- operations ----------------------------------------------------------------------------------------------------------------

    def operation(self, before: int, func: Any, out: Any) -> None:
        """Write down an operation in which memory was taken or given back."""
        frame = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename.startswith((LIBRARY, OWN, "<")):
            frame = frame.f_back
        place = (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name) if frame is not None else ("", 0, "")
        made = tuple((found[2], tuple(t.shape), t.dtype) for t in _plain_tensors(out) if (found := storage_of(t)) is not None)
        site = self.sites.setdefault((func, *place, made), len(self.sites))
        self.operations.extend((before, self.trace.count, site))

    def transferred(self, started: int, func: Any, nbytes: int) -> None:
        site = self.sites.setdefault((func, "", 0, "", ()), len(self.sites))
        self.transfers.extend((started, time.perf_counter_ns(), nbytes, site))

    # --- what blocks hold ----------------------------------------------------------------------------------------------------------

    def label(self, tensor: Tensor | None, category: str, name: str) -> None:
        if tensor is None or (found := storage_of(tensor)) is None:
            return
        self.trace.saw(tensor)
        number = self.labels.setdefault((category, name), len(self.labels))
        self.labelled.extend((self.trace.count, *found[1:], number))

    def recognise(self) -> None:
        """Label what models, optimizers and token stores hold now."""
        for root in filter(None, (reference() for reference in self._roots)):
            for name, parameter in root.named_parameters():
                self.label(parameter.detach(), "parameters", name)
                self.label(parameter.grad, "gradients", name)
                self.label(getattr(parameter, "main_grad", None), "gradients", name)
            for name, buffer in root.named_buffers():
                self.label(buffer, "parameters", f"{name} (buffer)")
        for optimizer in filter(None, (reference() for reference in self._optimizers.values())):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self.label(parameter.detach(), "optimizer", "master weights")  # where it is not a model's own
                    self.label(parameter.grad, "gradients", "of master weights")
            for state in optimizer.state.values():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        self.label(value, "optimizer", key)
        self._label_stores()

    def _label_stores(self) -> None:
        for store in self.sampler.stores:
            for name, span, tensor in store.held():
                if (key := (id(name), span, tensor.data_ptr())) not in self._extents:
                    self._extents.add(key)
                    self.label(tensor, "activations", str(name))


class Operations(TorchDispatchMode):
    """Sees every operation of a complete profile."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch, self._trace = watch, watch.trace
        self._ask_tensors = isinstance(watch.trace, StorageTrace)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        watch, trace = self._watch, self._trace
        if not watch.in_backward and not watch._stack and torch._C._current_autograd_node() is not None:
            watch.backward_begins()
        before = trace.count
        communicates = func.namespace in ("c10d", "_c10d_functional")
        started = time.perf_counter_ns() if communicates else 0
        out = func(*args, **(kwargs or {}))
        if self._ask_tensors:
            for tensor in _plain_tensors(out):
                trace.saw(tensor)
        if trace.count != before:
            watch.operation(before, func, out)
        if communicates:
            watch.transferred(started, func, sum(t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)))
        return out


def visible_parts(root: nn.Module) -> Iterator[nn.Module]:
    """Layers (the members of the outermost lists), and what stands beside them."""

    def has_list(module: nn.Module) -> bool:
        return any(isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1 for m in module.modules())

    for child in root.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            yield from child.children()
        elif has_list(child):
            yield from visible_parts(child)
        else:
            yield child


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of what a module is given or gives out: nested containers, dataclasses."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                yield from tensors_in(getattr(leaf, field.name))


def _plain_tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (tuple, list)):
        for part in out:
            yield from _plain_tensors(part)


def _living_tensors() -> Iterator[Tensor]:
    for found in gc.get_objects():
        if issubclass(type(found), Tensor):
            yield found
            if (grad := found.grad if found.is_leaf else None) is not None:
                yield grad
