"""PyTorch's flash kernel on CUDA, called below `scaled_dot_product_attention`; with it `torch.nn.attention.varlen`.

`aten::_flash_attention_forward` is what `varlen_attn` calls: [B, T, H, D], or packed [T, H, D] with cumulative lengths;
GQA, windows and causality aligned bottom-right, so a chunk of queries against its prefix is one call. It returns the LSE,
and `_backward` takes out and lse. The backward returns dK/dV in bf16 (and, with GQA, allocates them for all query heads):
blocks of `KEY_BLOCK` keys bound both, and their sum is wide.

`torch.nn.attention.activate_flash_attention_impl("FA3")` (or "FA4") replaces the kernel under these ops, here too.
"""

from __future__ import annotations

import torch

from longtrain.ops.attention import pieces
from longtrain.ops.attention.call import AttentionCall
from longtrain.ops.attention.pieces import CAUSAL, Library, Piece

KEY_BLOCK = 16384

_flash = torch.ops.aten._flash_attention_forward.default
_flash_backward = torch.ops.aten._flash_attention_backward.default


def refuse(call: AttentionCall) -> str | None:
    """Why the call cannot be served exactly, or None."""
    reason = refuse_call(call)
    if reason is not None:
        return reason
    for op in (_flash, _flash_backward):
        if missing := {"scale", "window_size_left", "window_size_right"} - {a.name for a in op._schema.arguments}:
            return f"{op} of torch {torch.__version__} has no {', '.join(sorted(missing))}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without its flash kernel"
    if call.softcap is not None:
        return "no softcap"
    if call.deterministic and not torch.are_deterministic_algorithms_enabled():
        return "its backward adds dQ in no fixed order, unless torch.use_deterministic_algorithms(True)"
    return None


def refuse_call(call: AttentionCall, oldest: tuple[int, int] = (8, 0), head_dim: int = 256) -> str | None:
    """What no flash attention library on GPUs does, or None: shared by the backends that call one."""
    if call.device.type != "cuda":
        return f"GPU kernels: the tensors are on {call.device.type}"
    if not torch.cuda.is_available():
        return "no GPU on this machine"
    if torch.cuda.get_device_capability(call.device) < oldest:
        return f"the GPU is older than sm_{oldest[0]}{oldest[1]}"
    return refuse_options(call, head_dim)


def refuse_options(call: AttentionCall, head_dim: int = 256) -> str | None:
    """The part of `refuse_call` that is the same on every machine."""
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"bfloat16 and float16 only, not {str(call.dtype).removeprefix('torch.')}"
    if call.partials == "fp32":
        return f"returns {str(call.dtype).removeprefix('torch.')} partial results, and partials='fp32' was asked for"
    if (reason := pieces.refuse(call)) is not None:
        return reason
    if call.head_dim % 8 or call.head_dim > head_dim:
        return f"head dim {call.head_dim} is not a multiple of 8 up to {head_dim}"
    if call.scale <= 0:
        return "positive scales only"
    return None


def for_kernel(piece: Piece, x_BTHD: torch.Tensor) -> torch.Tensor:
    """Packed pieces drop the batch axis; the kernels want the last axis contiguous."""
    x = x_BTHD if piece.cu_q is None else x_BTHD[0]
    return x if x.stride(-1) == 1 else x.contiguous()


def lse_from_kernel(piece: Piece, lse: torch.Tensor) -> torch.Tensor:
    """[B, H, T], packed [H, T], to [B, T, H]; +inf is the kernels' mark of a row that saw no key."""
    lse = (lse if piece.cu_q is None else lse[None]).transpose(1, 2)
    return lse.masked_fill(lse == torch.inf, -torch.inf)


def lse_for_kernel(piece: Piece, lse_BTH: torch.Tensor) -> torch.Tensor:
    lse = lse_BTH.masked_fill(lse_BTH == -torch.inf, torch.inf).transpose(1, 2).contiguous()
    return lse if piece.cu_q is None else lse[0]


def packing(piece: Piece, device: torch.device):
    """(cu_q, cu_k, longest_q, longest_k), the boundaries on the device; None for one document."""
    if piece.cu_q is None:
        return None, None, piece.queries, piece.keys
    longest = (max(b - a for a, b in zip(cu, cu[1:])) for cu in (piece.cu_q, piece.cu_k))
    return *(torch.tensor(cu, dtype=torch.int32, device=device) for cu in (piece.cu_q, piece.cu_k)), *longest


def _window(call: AttentionCall, piece: Piece) -> dict:
    left, right = (-1, -1) if piece.window == CAUSAL else piece.window
    return {"scale": call.scale, "window_size_left": left, "window_size_right": right}


def _forward(call: AttentionCall, piece: Piece, q, k, v):
    tensors = (for_kernel(piece, x) for x in (q, k, v))
    out, lse, *_ = _flash(*tensors, *packing(piece, q.device), 0.0, piece.window == CAUSAL, False, **_window(call, piece))
    return out.view_as(q), lse_from_kernel(piece, lse)


def _backward(call: AttentionCall, piece: Piece, dout, q, k, v, out, lse):
    tensors = (for_kernel(piece, x) for x in (dout, q, k, v, out))
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    gradients = _flash_backward(
        *tensors, lse_for_kernel(piece, lse), *packing(piece, q.device), 0.0, piece.window == CAUSAL, rng_state, unused,
        **_window(call, piece),
    )
    return tuple(x if piece.cu_q is None else x[None] for x in gradients)


LIBRARY = Library(forward=_forward, backward=_backward, aligned=True, packed=True, key_block=KEY_BLOCK)


def forward(call: AttentionCall, q, k, v, sink_logits):
    """q [B, T, H, D], k, v [B, S, K, D] -> out [B, T, H, D] in q's dtype, lse [B, T, H] float32."""
    return pieces.forward(call, LIBRARY, q, k, v, sink_logits)


def backward(call: AttentionCall, dout, q, k, v, out, lse, delta, dk, dv):
    """Adds into dk, dv [B, S, K, D] (float32), returns dq."""
    return pieces.backward(call, LIBRARY, dout, q, k, v, out, lse, dk, dv)
