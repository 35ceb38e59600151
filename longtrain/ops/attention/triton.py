"""The Triton kernels in `kernels/attention_*.py`: every option, on NVIDIA GPUs from sm_80 on.

Tiles outside the mask are never computed; nothing is allocated beyond the results, two floats a row and, packed, a table
of documents. A call becomes `Launch`es, which are data: they can be run, and compiled without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from longtrain.kernels.attention_configs import Tiles, candidates
from longtrain.ops.attention.call import AttentionCall, Document
from longtrain.ops.attention.mask import dropout_threshold
from longtrain.ops.launch import Launch, interpreted, padded, refuse_kernels

LONGEST = 2**29
LOG2E = 1.4426950408889634


def refuse(call: AttentionCall) -> str | None:
    """Why the call cannot be served, or None."""
    if (reason := refuse_kernels(call.device, call.dtype, call.wide)) is not None:
        return reason
    if max(call.head_dim, call.value_dim) > 256:
        return f"head dim {max(call.head_dim, call.value_dim)} is above 256"
    if max(call.queries, call.keys, call.block * call.stride) >= LONGEST:
        return f"not for {LONGEST} tokens or more, nor blocks so far apart"
    return None


def _word(x: int) -> int:
    """The low 32 bits, as the signed integer that has them."""
    return (x + 2**31) % 2**32 - 2**31


def _bounds(call: AttentionCall, doc: Document) -> tuple[int, ...]:
    """The row of `DOCUMENT` in kernels/attention_tiles.py."""
    from longtrain.kernels.attention_tiles import FAR

    def near_enough(x: int) -> int:
        return max(-FAR, min(FAR, x))

    shift, (left, right) = doc.q_shift - call.k_offset, call.window
    low = -FAR if left < 0 else shift - left
    diagonal = shift if call.causal else FAR
    high = diagonal if right < 0 else min(diagonal, shift + right)
    origin = doc.origin - call.k_offset
    return (
        doc.q_start, doc.q_stop, doc.k_start, doc.k_stop, near_enough(low), near_enough(high), near_enough(diagonal),
        near_enough(origin), near_enough(origin + call.sink_tokens), -origin % (call.block * call.stride or 1),
        _word(doc.q_shift),
    )


def _documents(call: AttentionCall) -> dict[str, Any]:
    """One document's numbers as arguments, several as a table on the device."""
    rows = [_bounds(call, doc) for doc in call.documents]
    if not call.packed:
        names = ("low", "high", "diagonal", "sink_start", "sink_stop", "phase", "q_shift")
        return {"documents": None, "documents_count": 1} | dict(zip(names, rows[0][4:], strict=True))
    table = torch.tensor(rows, dtype=torch.int32)
    if call.device.type == "cuda":
        table = table.pin_memory().to(call.device, non_blocking=True)
    unused = dict.fromkeys(("low", "high", "diagonal", "sink_start", "sink_stop", "phase", "q_shift"), 0)
    return {"documents": table, "documents_count": len(rows)} | unused


def _box(x_BTHD: torch.Tensor, block_tokens: int, block_dim: int, wanted: bool):
    """A tensor descriptor of x as [B, H, T, D] for tiles [block_tokens, block_dim], or None where the hardware has none for it."""
    x = x_BTHD.transpose(1, 2)
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    if not wanted or x.numel() == 0 or x.stride(-1) != 1 or x.data_ptr() % 16 or any(s <= 0 or s % 16 for s in strides):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [1, 1, block_tokens, block_dim])


def _arguments(call: AttentionCall, q, k, v) -> dict[str, Any]:
    """What all kernels take."""
    cap = 1.0 if call.scale == 0 else call.softcap  # a rate of 0 has no inverse; capped scores of 0 are 0 all the same
    return {
        "seed_low": _word(call.dropout_seed), "seed_high": _word(call.dropout_seed >> 32),
        "head_offset": _word(call.head_offset), "k_offset": _word(call.k_offset),
        "threshold": _word(dropout_threshold(call.dropout_p)), "keys": call.keys,
        "q": q, "k": k, "v": v, "q_strides": q.stride(), "k_strides": k.stride(), "v_strides": v.stride(),
        "queries": call.queries, "rate": LOG2E if cap else call.scale * LOG2E,
        "cap": (call.scale / cap, cap) if cap else None, "upscale": 1 / (1 - call.dropout_p),
        "GROUP": call.group, "DIM": call.head_dim, "VALUE_DIM": call.value_dim, "PACKED": call.packed,
        "SOFTCAP": cap is not None, "DROPOUT": call.dropout_p > 0,
        "BLOCK": call.block, "PERIOD": call.block * call.stride,
        "BLOCK_DIM": padded(call.head_dim), "BLOCK_VALUE": padded(call.value_dim),
        # Three tf32 products are as exact as float32's own and faster, but wide heads leave no registers for them.
        "PRECISION": "tf32x3" if call.dtype == torch.float32 and widest(call) <= 128 else "ieee",
    }


def widest(call: AttentionCall) -> int:
    """The wider head dim as the kernels pad it."""
    return max(padded(call.head_dim), padded(call.value_dim))


def _specials(call: AttentionCall) -> bool:
    return call.windowed and (call.sink_tokens > 0 or call.stride > 0)


def _grid(tokens: int, block: int, call: AttentionCall) -> int:
    """Programs over one side's tiles; packed, as `find_document` counts them."""
    return tokens // block + len(call.documents) if call.packed else -(-tokens // block)


def _key_boxes(call: AttentionCall, tiles: Tiles, k, v) -> dict[str, Any]:
    return {
        "k_box": _box(k, tiles.block_k, padded(call.head_dim), tiles.boxes),
        "v_box": _box(v, tiles.block_k, padded(call.value_dim), tiles.boxes),
        "BLOCK_MASKED": max(16, tiles.block_k // 2),
    }


def forward_launch(call: AttentionCall, tiles: Tiles, q, k, v, sink_logits, out, lse) -> Launch:
    from longtrain.kernels.attention_forward import attention_forward

    arguments = _arguments(call, q, k, v) | _documents(call)
    sign = -1 if arguments["rate"] < 0 else 1
    arguments["rate"] *= sign
    arguments |= {
        "out": out, "lse": lse, "sink_logits": None if sink_logits is None else sink_logits.contiguous(),
        "SIGN": sign, "SINK_LOGITS": sink_logits is not None,
        "SPECIALS": _specials(call), "BLOCK_Q": tiles.block_q, "BLOCK_K": tiles.block_k,
    } | _key_boxes(call, tiles, k, v)
    grid = (_grid(call.queries, tiles.block_q, call), call.heads, call.batch)
    return Launch(kernel=attention_forward, grid=grid, arguments=arguments, warps=tiles.warps, stages=tiles.stages)


def _backward_arguments(call: AttentionCall, tiles: Tiles, q, k, v, dout, lse_BHT, delta_BHT) -> dict[str, Any]:
    return _arguments(call, q, k, v) | _documents(call) | {
        "dout": dout, "dout_strides": dout.stride(), "lse": lse_BHT, "delta": delta_BHT, "scale": call.scale,
        "BLOCK_Q": tiles.block_q, "BLOCK_K": tiles.block_k,
    }


def dq_launch(call: AttentionCall, tiles: Tiles, q, k, v, dout, lse_BHT, delta_BHT, dq) -> Launch:
    from longtrain.kernels.attention_backward import attention_dq

    arguments = _backward_arguments(call, tiles, q, k, v, dout, lse_BHT, delta_BHT) | {"dq": dq, "SPECIALS": _specials(call)}
    arguments |= _key_boxes(call, tiles, k, v)
    grid = (_grid(call.queries, tiles.block_q, call), call.heads, call.batch)
    return Launch(kernel=attention_dq, grid=grid, arguments=arguments, warps=tiles.warps, stages=tiles.stages)


def dk_dv_launches(call: AttentionCall, tiles: Tiles, q, k, v, dout, lse_BHT, delta_BHT, dk, dv) -> Iterator[Launch]:
    from longtrain.kernels.attention_backward import attention_dk_dv

    arguments = _backward_arguments(call, tiles, q, k, v, dout, lse_BHT, delta_BHT)
    arguments |= {"dk": dk, "dv": dv, "dk_strides": dk.stride(), "dv_strides": dv.stride()}
    arguments |= {
        "BLOCK_MASKED": max(16, tiles.block_q // 2),
        "q_box": _box(q, tiles.block_q, padded(call.head_dim), tiles.boxes),
        "dout_box": _box(dout, tiles.block_q, padded(call.value_dim), tiles.boxes),
    }
    options = {"kernel": attention_dk_dv, "warps": tiles.warps, "stages": tiles.stages}
    grid = (_grid(call.keys, tiles.block_k, call), call.kv_heads, call.batch)
    yield Launch(grid=grid, arguments=arguments | {"SPECIALS": False}, **options)
    if _specials(call):
        most = max((_count_specials(call, doc) for doc in call.documents), default=0)
        grid = (-(-most // tiles.block_k), call.kv_heads, len(call.documents) if call.packed else call.batch)
        yield Launch(grid=grid, arguments=arguments | {"SPECIALS": True}, **options)


def _count_specials(call: AttentionCall, doc: Document) -> int:
    """At least the kernel's number of special keys of the document."""
    keys, period = doc.k_stop - doc.k_start, call.block * call.stride
    return min(keys, call.sink_tokens) + ((keys // period + 2) * call.block if period else 0)


def tiles_of(kernel: str, call: AttentionCall) -> tuple[Tiles, ...]:
    """The sets of tiles to choose from for a call, the default first."""
    capability = torch.cuda.get_device_capability(call.device) if call.device.type == "cuda" else (0, 0)
    return candidates(kernel, capability, widest(call), call.dtype.itemsize)


def _tiles(kernel: str, call: AttentionCall) -> Tiles:
    """The default where results must not depend on timing, else the fastest on a sample with this call's options."""
    choices = tiles_of(kernel, call)
    fixed = call.deterministic or torch.are_deterministic_algorithms_enabled() or interpreted()
    if fixed or len(choices) == 1:
        return choices[0]
    T, S = 2048, 8192
    kv_heads = max(1, 16 // call.group)
    whole = Document(q_start=0, q_stop=T, k_start=0, k_stop=S, q_shift=S - T, origin=0)
    return _fastest(kernel, replace(
        call, batch=1, queries=T, keys=S, heads=kv_heads * call.group, kv_heads=kv_heads, k_offset=0, documents=(whole,),
        packed=False, has_sink_logits=False, scale=call.head_dim**-0.5, dropout_seed=0, head_offset=0, has_dlse=False,
    ))


@functools.lru_cache(maxsize=None)
def _fastest(kernel: str, call: AttentionCall) -> Tiles:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    def random(tokens: int, heads: int, dim: int, dtype=call.dtype) -> torch.Tensor:
        return torch.randn(1, tokens, heads, dim, dtype=dtype, device=call.device)

    T, S, H, K, D, V = call.queries, call.keys, call.heads, call.kv_heads, call.head_dim, call.value_dim
    q, k, v, out, lse = random(T, H, D), random(S, K, D), random(S, K, V), random(T, H, V), torch.zeros(1, H, T, device=call.device)
    dk, dv = random(S, K, D, torch.float32), random(S, K, V, torch.float32)
    seconds = {}
    for tiles in tiles_of(kernel, call):
        launches = {
            "forward": lambda: [forward_launch(call, tiles, q, k, v, None, out, lse)],
            "dk_dv": lambda: list(dk_dv_launches(call, tiles, q, k, v, out, lse, lse, dk, dv)),
            "dq": lambda: [dq_launch(call, tiles, q, k, v, out, lse, lse, torch.empty_like(q))],
        }[kernel]()
        try:
            seconds[tiles] = do_bench(lambda: [launch.run() for launch in launches], warmup=10, rep=40)
        except OutOfResources:  # a GPU with less shared memory than others of its kind
            continue
    if not seconds:
        raise RuntimeError(f"attention: no tile sizes of the {kernel} kernel fit this GPU; choose another backend by name")
    return min(seconds, key=seconds.get)


def forward(call: AttentionCall, q, k, v, sink_logits, tiles: Tiles | None = None):
    """q [B, T, H, D], k [B, S, K, D], v [B, S, K, Dv] -> out [B, T, H, Dv] in q's dtype, lse [B, T, H] float32."""
    out = torch.empty(call.batch, call.queries, call.heads, call.value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(call.batch, call.queries, call.heads, dtype=call.wide, device=q.device)
    with torch.cuda.device_of(q):
        forward_launch(call, tiles or _tiles("forward", call), q, k, v, sink_logits, out, lse).run()
    return out, lse


def row_delta(call: AttentionCall, dout, out, dlse):
    """delta_bth = dout_bth . out_bth - dlse_bth, [B, T, H] (in memory [B, H, T]) float32."""
    from longtrain.kernels.attention_backward import attention_delta

    delta_BHT = torch.empty(call.batch, call.heads, call.queries, dtype=call.wide, device=call.device)
    arguments = {
        "dout": dout, "out": out, "dlse": dlse, "delta": delta_BHT, "queries": call.queries,
        "dout_strides": dout.stride(), "out_strides": out.stride(), "dlse_strides": None if dlse is None else dlse.stride(),
        "VALUE_DIM": call.value_dim, "DLSE": dlse is not None, "BLOCK_VALUE": padded(call.value_dim), "BLOCK_Q": 64,
    }
    grid = (-(-call.queries // 64), call.heads, call.batch)
    with torch.cuda.device_of(dout):
        Launch(kernel=attention_delta, grid=grid, arguments=arguments, warps=4, stages=1).run()
    return delta_BHT.transpose(1, 2)


def backward(call: AttentionCall, dout, q, k, v, out, lse, delta, dk, dv, tiles: Tiles | None = None):
    """Adds into dk [B, S, K, D] and dv [B, S, K, Dv] (float32), returns dq. delta [B, T, H] as in `reference.py`."""
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse_BHT, delta_BHT = lse.transpose(1, 2).contiguous(), delta.transpose(1, 2).contiguous()
    with torch.cuda.device_of(q):
        for launch in dk_dv_launches(call, tiles or _tiles("dk_dv", call), q, k, v, dout, lse_BHT, delta_BHT, dk, dv):
            launch.run()
        dq_launch(call, tiles or _tiles("dq", call), q, k, v, dout, lse_BHT, delta_BHT, dq).run()
    return dq
