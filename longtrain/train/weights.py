"""Weights as Hugging Face keeps them, safetensors in one file or several with an index, read into a model of longtrain's own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` from a safetensors file or a directory of them, tensor by tensor. Raises ValueError naming what does not fit."""
    files = _files_of(path)
    own = {name: p.detach() for name, p in model.named_parameters()}
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own.keys()
    read, wrong = set(), []
    try:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    if name in aliases:
                        continue
                    shape = opened.get_slice(name).get_shape()
                    if name not in own or list(own[name].shape) != shape:
                        wrong.append(f"{name} {shape}" + (f" for {list(own[name].shape)}" if name in own else ", which the model lacks"))
                    else:
                        own[name].copy_(opened.get_tensor(name))
                        read.add(name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}); fetch it again") from error
    wrong += [f"no {name}" for name in sorted(own.keys() - read)]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path} does not fit the model section: {'; '.join(wrong[:5])}{more}; make that section describe these weights")


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter that dtype, in place, but those in 8 bits. Buffers stay as they are: rotary frequencies must not be rounded."""
    for parameter in model.parameters():
        if parameter.element_size() > 1:
            parameter.data = parameter.data.to(dtype)


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / INDEX).is_file():
        files = sorted({path / name for name in json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{path / INDEX} names {missing[0]}, which is not there; fetch it")
        return files
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    raise ValueError(f"{path} is no safetensors file, and no directory with {INDEX} or {SINGLE}; give one of these")
