"""Machines that plans can be made for: built-in figures with their sources, and profiles that `longtrain calibrate` wrote.

Vendors' figures are what the silicon can do; a step sees a share of them. SHARES says which, measured where a source is given.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from longtrain.planner.rates import Rates

PRODUCTS_SHARE = 0.72
"""Of the vendor's dense bf16 rate, in matrix products of 4096 and more: an H200 gave 790 of 989 TFLOP/s alone, and what a step has
between its products (launches, tails of tiles, clocks under load) takes a tenth of it."""

MOVED_SHARE = 0.8
"""Of the vendor's memory bandwidth, in element-wise operations."""

LINK_SHARE = 0.75
"""Of a link's bandwidth in one direction, in collectives and pinned copies."""

NVME = {"disk_write": 3e9, "disk_read": 5e9}
"""One PCIe 4 NVMe disk, sustained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Raises what `Rates` raises."""

    name: str
    device: str
    """cuda or cpu."""
    memory: int
    """Bytes of the device."""
    rates: Rates
    peak_flops: float
    """Dense FLOP/s in bf16 that utilisation is a share of."""
    source: str
    dtype: str = "bfloat16"
    """That products and attention were measured in."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def _gpu(name: str, gb: float, tflops: float, memory_tbs: float, pcie_gbs: float, link_gbs: float, forward: float, backward: float,
         source: str, *, products_share: float = PRODUCTS_SHARE) -> Machine:  # fmt: skip
    """`gb` as vendors say it: GiB, of which the driver keeps a hundredth. `forward` and `backward`: TFLOP/s of attention at head dim 128.
    `link_gbs`: to another device, one direction."""
    products = products_share * tflops * 1e12
    return Machine(
        name=name, device="cuda", memory=int(0.99 * gb * 2**30), peak_flops=tflops * 1e12, source=source,
        rates=Rates(
            flops=products, products=((512, 0.4 * products), (1024, 0.65 * products), (4096, products)),
            attention=((64, 0.75e12 * forward), (128, 1e12 * forward)),
            attention_backward=((64, 0.75e12 * backward), (128, 1e12 * backward)),
            moved=MOVED_SHARE * memory_tbs * 1e12, optimizer=MOVED_SHARE * memory_tbs * 1e12, host_optimizer=60e9, launch=5e-6,
            host_write=LINK_SHARE * pcie_gbs * 1e9, host_read=LINK_SHARE * pcie_gbs * 1e9, link=LINK_SHARE * link_gbs * 1e9, **NVME,
        ),
    )  # fmt: skip


FA2 = "attention: FlashAttention-2, figs. 4 and 6 (arXiv:2307.08691)"
CUDNN = "attention: cuDNN at 8K as FlashAttention-3 measured it (arXiv:2407.08608)"

MACHINES = {
    machine.name: machine
    for machine in (
        _gpu("a100", 80, 312, 2.039, 32, 300, 225, 190, f"NVIDIA A100 datasheet (SXM 80 GB); {FA2}"),
        _gpu("a800", 80, 312, 2.039, 32, 200, 225, 190, f"NVIDIA A800 datasheet (SXM 80 GB: an A100 with NVLink at 400 GB/s); {FA2}"),
        _gpu("h100", 80, 989, 3.35, 64, 450, 566, 470, f"NVIDIA H100 datasheet (SXM); {CUDNN}"),
        _gpu("h200", 141, 989, 4.8, 64, 450, 566, 470, f"NVIDIA H200 datasheet (SXM); {CUDNN}"),
        _gpu("b200", 180, 2250, 7.7, 64, 900, 1240, 1030, 
             "NVIDIA DGX B200 datasheet, an eighth; attention: the H100's share of peak, assumed"),
        _gpu("rtx3090", 24, 71, 0.936, 32, 24, 55, 45,
             "NVIDIA GA102 whitepaper (bf16, float32 sums); attention: the A100's share, assumed"),
        _gpu("rtx4090", 24, 165, 1.008, 32, 24, 120, 100, 
             "NVIDIA Ada whitepaper (bf16, float32 sums); attention: the A100's share, assumed"),
        _gpu("rtx5090", 32, 209.5, 1.792, 64, 48, 150, 126, 
             "NVIDIA RTX Blackwell whitepaper (bf16, float32 sums); attention: the A100's share, assumed"),
    )
}  # fmt: skip
"""By name; --device takes one of them."""


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU here, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def find_machine(name: str) -> Machine:
    """A built-in machine, or the profile in a JSON file. Raises ValueError naming what there is."""
    if (found := MACHINES.get(name.lower())) is not None:
        return found
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"device: {name!r} is no machine that is known ({', '.join(MACHINES)}) and no file that longtrain calibrate wrote")
    try:
        data = json.loads(path.read_text())
        rates = {key: tuple(map(tuple, value)) if isinstance(value, list) else value for key, value in data.pop("rates").items()}
        return Machine(**data, rates=Rates(**rates))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"device: {path} is no profile of a machine ({error}); make one with: longtrain calibrate --out {path}") from None
