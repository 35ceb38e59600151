"""What a configuration may say of memory: the budget or the plan by hand, and the slower tiers. Docstrings are the reference."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from longtrain.config.bounds import at_least, between
from longtrain.offload import DiskSettings
from longtrain.plan import STAY, Fraction, Offload, Split
from longtrain.units import parse_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskConfig:
    """The disk as a tier: one file of a fixed size, made for the run and gone with it."""

    path: str
    """A directory on a real disk, best a fast local one. Example: /scratch."""

    budget: str
    """Size of the file, taken when the run begins. Example: 200GiB."""

    max_written: str | None = None
    """What the run may write to the disk in all, for disks wear; no limit when not given. Example: 50TB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitConfig:
    """Where the tokens of one kind of tensor live: the last ones on the device, those before them on the host, the first ones on disk."""

    device: float = 0.0
    """Share (0 to 1) of the tokens that stay on the device. Example: 0.25."""

    host: float = 0.0
    """Share (0 to 1) of the tokens that go to host memory; those that are left go to disk. Example: 0.5."""

    compress: bool = False
    """Keep them in FP8 off the device. This is lossy: gradients are no longer exact."""


Where = Literal["device", "host", "disk"] | SplitConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadConfig:
    """What leaves the device between forward and backward pass, by kind of tensor: one for all layers, or a list with one a layer."""

    inputs: Where | tuple[Where, ...] = "device"
    """Hidden states between layers. Example: disk."""

    gradients: Where | tuple[Where, ...] = "device"
    """Gradients of the hidden states between layers. Example: disk."""

    outputs: Where | tuple[Where, ...] = "device"
    """Stored attention outputs (`memory.store_outputs`). Example: {device: 0.25, host: 0.5}."""

    kv: Where | tuple[Where, ...] = "device"
    """Stored keys and values (`memory.store_kv`; of windowed layers, all; of long convolutions their inputs). Example: disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """How the step is streamed: `budget` alone, and the planner chooses; or `chunk_tokens` and the keys below it, by hand.

    With neither, the model trains with PyTorch's own autograd and nothing is streamed. `host_budget` and `disk` are slower tiers, which
    the planner uses as far as the budget needs them; by hand, `offload` says what goes there.
    """

    budget: str | None = None
    """Memory that the run may take, such as 1.5GiB or 72GB (peak resident memory on a CPU, device memory on a GPU). Example: 1.5GiB."""

    host_budget: str | None = None
    """Host memory for what leaves the device (on a CPU: a second arena in the same memory, of use for tests). Example: 100GiB."""

    disk: DiskConfig | None = None
    """The disk tier. Example: {path: /scratch, budget: 200GiB}."""

    optimizer: Literal["device", "host"] = "device"
    """Where AdamW's moments and the float32 weights live. `host`: not on the GPU; gradients travel there one by one as the update needs
    them, and weights back. Without a GPU it makes no difference."""

    staging: str | None = None
    """Device memory for bytes on their way to and from the slower tiers; 64MiB when not given. Example: 512MiB."""

    offload: OffloadConfig | None = None
    """By hand, what leaves the device. Example: {inputs: disk, outputs: disk}."""

    chunk_tokens: int | None = None
    """Tokens streamed at a time. Larger chunks run faster and hold more activations. Example: 4096."""

    segment_layers: int | None = None
    """Consecutive layers that are streamed backward together, at most all of them. 1 when not given. Example: 2."""

    store_outputs: Fraction | None = None
    """Fraction (0 to 1) of the tokens whose attention outputs are kept from the forward pass instead of computed again: one
    number, or a list with one a layer. 1.0 when not given. Example: 0.5."""

    store_kv: Fraction | None = None
    """Fraction (0 to 1) of the tokens whose keys and values are kept from the forward pass: one number, or a list with one a
    layer. 0.0 when not given. Example: 0.5."""

    kv_block_tokens: int | None = None
    """Keys and values of layers that see the whole sequence come to the device in blocks of so many tokens, a multiple of
    `memory.chunk_tokens`, from where `memory.offload.kv` has them. Whole on the device when not given. Example: 65536."""

    boundaries: Literal["stream", "tensor"] | None = None
    """`stream`: what travels between layers is freed chunk by chunk. `tensor`: ordinary tensors, for code that looks at hidden
    states between layers. `stream` when not given."""

    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at one time. When not given, as many as fill 8 MiB on a CPU, 2 GiB on a GPU (64 to 8,192).
    Example: 1024."""

    def __post_init__(self) -> None:
        by_hand = [f.name for f in fields(self) if f.name not in ("budget", "optimizer", *TIERS) and getattr(self, f.name) is not None]
        slower = [name for name in TIERS if getattr(self, name) is not None]
        sizes = {f"memory.{name}": getattr(self, name) for name in ("budget", "host_budget", "staging")}
        if self.disk is not None:
            sizes |= {"memory.disk.budget": self.disk.budget, "memory.disk.max_written": self.disk.max_written}
        for name, size in sizes.items():
            if size is not None:
                parse_bytes(size, name)
        if self.budget is not None and by_hand:
            raise ValueError(f"memory.{by_hand[0]}: contradicts memory.budget, with which the planner chooses it; remove one of the two")
        if self.budget is None and self.chunk_tokens is None and (by_hand or slower):
            raise ValueError(
                f"memory.{(by_hand or slower)[0]}: has no effect without memory.chunk_tokens; add chunk_tokens, or remove it"
                if by_hand else f"memory.{slower[0]}: has no effect where nothing is streamed; add memory.budget, or remove it"
            )
        if self.staging is not None and slower == ["staging"]:
            raise ValueError("memory.staging: has no effect without memory.disk or memory.host_budget; add one, or remove it")
        if self.budget is None and slower and self.offload is None:
            raise ValueError(f"memory.{slower[0]}: has no effect without memory.offload when the plan is made by hand; say what goes there")
        for name in ("chunk_tokens", "segment_layers", "loss_chunk_tokens", "kv_block_tokens"):
            if getattr(self, name) is not None:
                at_least(f"memory.{name}", getattr(self, name), 1)
        if self.kv_block_tokens is not None and self.chunk_tokens is not None and self.kv_block_tokens % self.chunk_tokens:
            raise ValueError(
                f"memory.kv_block_tokens: must be a multiple of memory.chunk_tokens ({self.chunk_tokens}), found {self.kv_block_tokens}"
            )
        for name in ("store_outputs", "store_kv"):
            value = getattr(self, name)
            for fraction in value if isinstance(value, tuple) else () if value is None else (value,):
                between(f"memory.{name}", fraction, 0, 1)
        try:
            self.tiers()
        except ValueError as error:
            raise ValueError(
                f"memory.offload: {error}".replace("offload.disk", "memory.disk").replace("offload.host_bytes", "memory.host_budget")
            ) from None

    def tiers(self) -> Offload | None:
        """The slower tiers, and what `offload` sends there; None where there are none."""
        if self.offload is None and self.disk is None and self.host_budget is None:
            return None
        disk, sizes = self.disk, {}
        if disk is not None:
            written = None if disk.max_written is None else parse_bytes(disk.max_written)
            sizes["disk"] = DiskSettings(path=disk.path, budget=parse_bytes(disk.budget), max_written=written)
        if self.host_budget is not None:
            sizes["host_bytes"] = parse_bytes(self.host_budget)
        if self.staging is not None:
            sizes["staging_bytes"] = parse_bytes(self.staging)
        splits = {} if self.offload is None else {f.name: _split(getattr(self.offload, f.name)) for f in fields(OffloadConfig)}
        return Offload(**sizes, **splits)

    def plan_settings(self) -> dict:
        """The settings given by hand, as arguments of `lt.Plan`."""
        not_plan = ("budget", "offload", "optimizer", *TIERS)
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in not_plan and getattr(self, f.name) is not None}
        return settings | ({"offload": self.tiers()} if settings and self.offload is not None else {})


TIERS = ("host_budget", "disk", "staging")


def _split(value: Where | tuple[Where, ...]) -> Split | tuple[Split, ...]:
    if isinstance(value, tuple):
        return tuple(map(_split, value))
    if isinstance(value, SplitConfig):
        return Split(device=value.device, host=value.host, compress=value.compress)
    return STAY if value == "device" else Split(host=float(value == "host"))
