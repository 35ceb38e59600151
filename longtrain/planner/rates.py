"""What a machine does in a second, and how long the parts of a streamed step take by that: data and two formulas."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longtrain.planner.cost import CHUNK_OVERHEAD_TOKENS, ModelFootprint
from longtrain.span import chunk_spans
from longtrain.stream.footprint import LayerFootprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Speeds that the search weighs a transfer against computing again by. What transfers take while the device computes costs nothing."""

    flops: float
    """FLOP/s of a step: attention and matrix products in the model's dtype, with everything between them."""

    host_write: float
    """Bytes/s from the device to host memory, checksums included."""

    host_read: float
    """Bytes/s back."""

    disk_write: float
    """Bytes/s from the device to the disk (`tools/bench_offload.py` measures them)."""

    disk_read: float
    """Bytes/s back."""

    def __post_init__(self) -> None:
        for name in ("flops", "host_write", "host_read", "disk_write", "disk_read"):
            if not getattr(self, name) > 0:
                raise ValueError(f"rates.{name} must be above 0, found {getattr(self, name)!r}")

    def write(self, tier: str) -> float:
        return {"host": self.host_write, "disk": self.disk_write}[tier]

    def read(self, tier: str) -> float:
        return {"host": self.host_read, "disk": self.disk_read}[tier]


def usual_rates(device: torch.device) -> Rates:
    """Where nothing was measured. CPU: 45 GFLOP/s a thread, a disk at 1.3 GB/s write and 0.9 read, as on the machine that the README's
    figures are from; GPU: 400 TFLOP/s, PCIe 4 and a fast NVMe disk."""
    if device.type == "cuda":
        return Rates(flops=400e12, host_write=22e9, host_read=22e9, disk_write=3e9, disk_read=5e9)
    return Rates(flops=45e9 * torch.get_num_threads(), host_write=4e9, host_read=4e9, disk_write=1.3e9, disk_read=0.9e9)


def attention_flops(layer: LayerFootprint, model: ModelFootprint, tokens: int, chunk: int) -> float:
    """Of one forward pass over one sequence: two products of 2 H D FLOP for each (query, key) that is visible. 0 where nothing attends."""
    if not layer.lse:
        return 0.0
    head_elements = (layer.output - layer.lse) / model.dtype.itemsize / len(layer.mixers)
    pairs = 0.0
    for mixer in layer.mixers:
        for span in chunk_spans(tokens, chunk):
            keys = len(mixer.keys_for(span)) - len(span) / 2 if layer.causal and hasattr(mixer, "keys_for") else tokens
            pairs += keys * len(span)
    return 4 * head_elements * pairs


def layer_seconds(model: ModelFootprint, tokens: int, batch: int, chunk: int, rates: Rates) -> list[tuple[float, float, float]]:
    """Of each layer: forward pass, backward pass, and attention forward once more where no output is stored. With A = attention forward
    and N = 2 FLOP a parameter and token: A + N, 2.5 A + 3 N (and 0.1 N for keys and values), A."""
    overhead = 1 + CHUNK_OVERHEAD_TOKENS / min(chunk, tokens)
    seconds, known = [], {}
    for layer in model.at(chunk):
        if (key := (layer.output, layer.lse, layer.causal, tuple(map(repr, layer.mixers)))) not in known:
            known[key] = attention_flops(layer, model, tokens, chunk)
        attention = known[key] * batch * overhead / rates.flops
        local = 2 * layer.parameters / model.dtype.itemsize * tokens * batch * overhead / rates.flops
        seconds.append((attention + local, 2.5 * attention + 3.1 * local, attention))
    return seconds
