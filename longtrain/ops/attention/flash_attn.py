"""The flash-attn packages, used when they are installed: 2 (`flash_attn`), 3 (`flash_attn_interface`), 4 (`flash_attn.cute`).

What is called are the functions under their autograd, since those return the LSE and take out and lse back. They are not public
and their arguments differ between releases, so every call is matched with the installed signature (`_call`): a name that this op
cannot do without and the function does not have makes the backend refuse. Masks are aligned bottom-right, as in `flash.py`; the
backward of 2 expands dK/dV to all query heads, hence blocks of keys.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.library import CustomOpDef

from longtrain.ops.attention import pieces
from longtrain.ops.attention.call import AttentionCall
from longtrain.ops.attention.flash import KEY_BLOCK, for_kernel, lse_for_kernel, lse_from_kernel, packing, refuse_call
from longtrain.ops.attention.pieces import CAUSAL, Library, Piece

NEEDED = {"q", "k", "v", "softmax_scale", "causal"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One major version: where its functions are and what the GPU must be. `dense`, `packed`: names of (forward, backward)."""

    module: str
    dense: tuple[str, str]
    packed: tuple[str, str]
    oldest: tuple[int, int]
    install: str
    softcap: bool
    """Both directions take it."""


PACKAGES = {
    "flash_attn_4": Package(
        module="flash_attn.cute.interface",
        dense=("_flash_attn_fwd", "_flash_attn_bwd"),
        oldest=(9, 0),
        softcap=False,
        packed=("_flash_attn_fwd", "_flash_attn_bwd"),
        install="pip install flash-attn-4",
    ),
    "flash_attn_3": Package(
        module="flash_attn_interface",
        dense=("_flash_attn_forward", "_flash_attn_backward"),
        oldest=(9, 0),
        softcap=True,
        packed=("_flash_attn_forward", "_flash_attn_backward"),
        install="build it from the hopper folder of flash-attention",
    ),
    "flash_attn_2": Package(
        module="flash_attn.flash_attn_interface",
        dense=("_flash_attn_forward", "_flash_attn_backward"),
        oldest=(8, 0),
        packed=("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
        softcap=True,
        install="pip install longtrain[flash]",
    ),
}


@functools.cache
def _functions(module: str) -> Any | ImportError:
    """The package's module, or why it does not import (a missing package, or one built for another torch)."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return error


@dataclass(frozen=True, slots=True)
class Backend:
    """A package as a backend of the op: `refuse`, `forward`, `backward` as in the other files."""

    package: Package

    def refuse(self, call: AttentionCall) -> str | None:
        reason = refuse_call(call, oldest=self.package.oldest)
        if reason is not None:
            return reason
        functions = _functions(self.package.module)
        if isinstance(functions, ImportError):
            return f"{functions}: {self.package.install}"
        if call.softcap is not None and not self.package.softcap:
            return "no softcap"
        for name in (*self.package.dense, *self.package.packed):
            reason = unknown_signature(getattr(functions, name, None), name, call)
            if reason is not None:
                return reason
        return None

    def library(self, functions: Any) -> Library:
        """The package's kernels; `functions` has the functions that `package` names."""
        return Library(
            forward=functools.partial(_forward, self.package, functions),
            backward=functools.partial(_backward, self.package, functions),
            aligned=True,
            packed=True,
            key_block=KEY_BLOCK,
        )

    def forward(self, call: AttentionCall, q, k, v, sink_logits):
        return pieces.forward(call, self.library(_functions(self.package.module)), q, k, v, sink_logits)

    def backward(self, call: AttentionCall, dout, q, k, v, out, lse, delta, dk, dv):
        return pieces.backward(call, self.library(_functions(self.package.module)), dout, q, k, v, out, lse, dk, dv)


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    """Of a function, or of the one behind a `torch.library.custom_op` (flash-attn 2)."""
    return inspect.signature(function._init_fn if isinstance(function, CustomOpDef) else function).parameters


def unknown_signature(function: Callable | None, name: str, call: AttentionCall) -> str | None:
    """Why an installed function cannot be called, or None."""
    if function is None:
        return f"the installed release has no {name}"
    names = set(_parameters(function))
    needed = (
        NEEDED
        | ({"softcap"} if call.softcap is not None else set())
        | ({"deterministic"} if call.deterministic and "dout" in names else set())
    )
    if call.windowed and not names & {"window_size", "window_size_left"}:
        needed |= {"window_size"}
    return f"{name} of the installed release has no {', '.join(sorted(needed - names))}" if needed - names else None


def _call(function: Callable, **arguments: Any):
    """`function` with those arguments that it has; required ones that are not given are None (they are optional tensors)."""
    parameters = _parameters(function)
    if "window_size" in parameters:
        arguments["window_size"] = (arguments["window_size_left"], arguments["window_size_right"])
    given = {name: None for name, p in parameters.items() if p.default is p.empty}
    return function(**given | {name: value for name, value in arguments.items() if name in parameters})


def _arguments(call: AttentionCall, piece: Piece, package: Package) -> dict[str, Any]:
    cu_q, cu_k, longest_q, longest_k = packing(piece, call.device)
    left, right = (-1, -1) if piece.window == CAUSAL else piece.window
    if package.module.startswith("flash_attn.cute"):  # None is its unbounded
        left, right = (None if side == -1 else side for side in (left, right))
    return dict(
        softmax_scale=call.scale, causal=piece.window == CAUSAL, window_size_left=left, window_size_right=right, dropout_p=0.0,
        softcap=call.softcap or 0.0, deterministic=call.deterministic, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
        max_seqlen_q=longest_q if cu_q is not None else None, max_seqlen_k=longest_k if cu_k is not None else None,
        return_softmax=False, return_lse=True,
    )


def _forward(package: Package, functions: Any, call: AttentionCall, piece: Piece, q, k, v):
    function = getattr(functions, (package.dense if piece.cu_q is None else package.packed)[0])
    tensors = dict(zip("qkv", (for_kernel(piece, x) for x in (q, k, v))))
    out, lse, *_ = _call(function, **tensors, **_arguments(call, piece, package))
    return out.view_as(q), lse_from_kernel(piece, lse)


def _backward(package: Package, functions: Any, call: AttentionCall, piece: Piece, dout, q, k, v, out, lse):
    function = getattr(functions, (package.dense if piece.cu_q is None else package.packed)[1])
    tensors = dict(zip(("dout", "q", "k", "v", "out"), (for_kernel(piece, x) for x in (dout, q, k, v, out))))
    gradients = {"d" + name: torch.empty_like(tensors[name], memory_format=torch.contiguous_format) for name in "qkv"}
    lse_kernel = lse_for_kernel(piece, lse)
    returned = _call(function, **tensors, **gradients, lse=lse_kernel, softmax_lse=lse_kernel, **_arguments(call, piece, package))
    if "dq" not in _parameters(function):  # else they were written in place
        gradients = dict(zip(gradients, returned))
    return tuple(x if piece.cu_q is None else x[None] for x in gradients.values())


BACKENDS = {name: Backend(package) for name, package in PACKAGES.items()}
