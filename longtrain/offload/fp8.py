"""Lossy storage of activations: FP8 (e4m3) with a float32 scale for every 128 values of the last axis.

COAT's scheme for what non-linear layers keep for the backward pass (arXiv:2410.19313, mixed granularity; its one scale a tensor is for
inputs of FP8 products, and nothing multiplies in FP8 here). A value is x = scale * q with scale = amax(group) / 448; three bits of
mantissa give

    |decoded - x| <= max(2^-4 |x|, 2^-10 scale)      and one rounding to the tensor's dtype

A group that holds a NaN or an infinity decodes to NaN: nothing wrong is hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 128
LARGEST = 448.0
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def encode(tensor: Tensor) -> Tensor:
    """``[..., n]`` float32, bfloat16 or float16 to uint8: the values, then the scales. Raises ValueError for other dtypes."""
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"compress takes float32, bfloat16 or float16, found {tensor.dtype}; place this tensor without compress")
    groups = _grouped(tensor.float())
    scales = (groups.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    values = (groups / scales).to(torch.float8_e4m3fn).flatten(1)[:, : tensor.shape[-1]].contiguous()
    return torch.cat([values.flatten().view(torch.uint8), scales.flatten().view(torch.uint8)])


def decode(data: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What `encode` was given, to its error."""
    rows, groups = _rows_groups(shape)
    split = rows * shape[-1]
    values = _grouped(data[:split].view(torch.float8_e4m3fn).view(rows, shape[-1]).float())
    scales = data[split:].clone().view(torch.float32).view(rows, groups, 1)  # a copy: the values need not end on a multiple of four
    return (values * scales).flatten(1)[:, : shape[-1]].to(dtype).reshape(shape)


def _rows_groups(shape: tuple[int, ...]) -> tuple[int, int]:
    return torch.Size(shape[:-1]).numel(), -(-shape[-1] // GROUP)


def _grouped(tensor: Tensor) -> Tensor:
    """``[..., n]`` to ``[rows, groups, 128]``, zeros after the last value; one shorter group where n is at most 128."""
    rows, groups = _rows_groups(tensor.shape)
    size = min(GROUP, tensor.shape[-1])
    return pad(tensor.reshape(rows, tensor.shape[-1]), (0, groups * size - tensor.shape[-1])).view(rows, groups, size)
