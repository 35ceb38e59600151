"""Put a plan on a model: find the layers that can be streamed, prove them on a tiny input, replace their `forward`, report.

    report = lt.apply(model, lt.Plan(chunk_tokens=4096))
    print(report)
    report.undo()

Layers are found by structure: an `nn.ModuleList` whose members satisfy `longtrain.stream.protocol.StreamableLayer`. `forward` is
replaced on the layer instances (nothing is wrapped, parameter names stay), and only after the layer has been proved: run whole and in
chunks on its own `example`, with gradients, the two must agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from longtrain.nn.ends import TokenEmbed, TokenLoss
from longtrain.offload import DeviceStore
from longtrain.plan import Plan
from longtrain.stream.embed import streamed_token_embed
from longtrain.stream.loss import streamed_token_loss
from longtrain.stream.protocol import StreamableLayer
from longtrain.stream.segment import Chain, Progress, Segment

PROOF_TOKENS = 13
PROOF_CHUNK = 5
PROOF_BOUND = 1e-5
"""Relative norm in float64. Layers that upcast to float32 inside stop at 1e-7; one that leaks between tokens is off by far more."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One module of the report: what it became, or why it stayed."""

    name: str
    became: str
    why: str = ""


@dataclass(slots=True)
class Report:
    """What `apply` did; print it. `undo()` restores every `forward`."""

    plan: Plan
    entries: list[Entry] = field(default_factory=list)
    _chains: list[Chain] = field(default_factory=list, repr=False)
    _replaced: list[tuple[nn.Module, Callable | None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give every module the `forward` it had before."""
        for module, before in reversed(self._replaced):
            if before is None:
                del module.__dict__["forward"]
            else:
                module.forward = before
        self._replaced.clear()

    def on_progress(self, callback: Progress | None) -> None:
        """Call ``callback(phase, spans done, spans in all)`` after every span of every segment; None stops that."""
        for chain in self._chains:
            chain.progress = callback

    def check_replay(self, check: bool = True) -> None:
        """Compare the replayed mixer inputs with the forward's, bit for bit, and raise RuntimeError where they differ. For tests."""
        for chain in self._chains:
            chain.check_replay = check

    def _replace(self, module: nn.Module, forward: Callable) -> None:
        self._replaced.append((module, module.__dict__.get("forward")))
        module.forward = forward

    def __str__(self) -> str:
        width = max((len(entry.name) for entry in self.entries), default=0)
        lines = [f"{entry.name:{width}}  {entry.became}{': ' + entry.why if entry.why else ''}" for entry in self.entries]
        return "\n".join(lines)


def apply(model: nn.Module, plan: Plan) -> Report:
    """Stream `model`'s layers and head by `plan`, in place.

    Returns a printable report. Raises ValueError, with the model left as it was, when no layer can be streamed, when a layer fails its
    proof (unless ``plan.layer_fallback == "unstreamed"``), when one layer stands in two places, and when the model was applied already.
    """
    runs = _find_layers(model)
    layers = [(name, layer) for run in runs for name, layer in run]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of layers with token_args, mixers(), example() and forward(x, *, mix=None, ...): "
            "see longtrain.stream.protocol.StreamableLayer"
        )
    if any(_is_streamed(layer) for _, layer in layers):
        raise ValueError("lt.apply was called on this model already: call undo() of its report first")
    first_names: dict[int, str] = {}
    for name, layer in layers:
        if (other := first_names.setdefault(id(layer), name)) != name:
            raise ValueError(f"{name} is the same module as {other}: a layer that is used twice cannot be streamed; copy it")
    plan.check_layers(len(layers))

    report, index = Report(plan), 0
    chains: list[list[tuple[int, str, nn.Module]]] = []
    for run in runs:
        chains.append([])
        for name, layer in run:
            refusal = prove(layer)
            if refusal is None:
                chains[-1].append((index, name, layer))
            elif plan.layer_fallback == "error":
                raise ValueError(f'{name} cannot be streamed: {refusal}; Plan(layer_fallback="unstreamed") leaves it as it is')
            else:
                report.entries.append(Entry(name, "left as it is", refusal))
                chains.append([])
            index += 1
    if not any(chains):
        raise ValueError(f"no layer of {type(model).__name__} can be streamed:\n{report}")
    ends = {kind: [(name, m) for name, m in model.named_modules() if isinstance(m, kind)] for kind in (TokenEmbed, TokenLoss)}
    streams = plan.boundaries == "stream" and len(chains) == 1 and len(ends[TokenEmbed]) == len(ends[TokenLoss]) == 1
    for chain in filter(None, chains):
        _stream_chain(report, chain)
    chain = report._chains[0] if streams else None
    if streams:
        (name, module), = ends[TokenEmbed]
        report._replace(module, partial(streamed_token_embed, chain=chain))
        report.entries.append(Entry(name, "streamed embedding"))
    for name, module in ends[TokenLoss]:
        report._replace(module, partial(streamed_token_loss, chunk_tokens=plan.loss_chunk_tokens, chain=chain))
        report.entries.append(Entry(name, "streamed loss"))
    return report


def _is_streamed(layer: nn.Module) -> bool:
    forward = layer.__dict__.get("forward")
    return isinstance(getattr(getattr(forward, "func", forward), "__self__", None), Segment)


def _stream_chain(report: Report, layers: Sequence[tuple[int, str, nn.Module]]) -> None:
    """Replace the forwards of layers that follow each other."""
    chain, k = Chain(report.plan, DeviceStore()), report.plan.segment_layers
    report._chains.append(chain)
    for at in range(0, len(layers), k):
        members = layers[at : at + k]
        segment = Segment(
            chain, [layer for *_, layer in members], [i for i, *_ in members], first=at == 0, last=at + k >= len(layers)
        )
        for position, (_, name, layer) in enumerate(members):
            report._replace(layer, partial(segment.pass_through, position) if position else segment.forward)
            place = f", segment of {len(members)}" if len(members) > 1 else ""
            report.entries.append(Entry(name, f"streamed{place}"))


def _find_layers(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    return [
        [(f"{name}.{i}" if name else str(i), layer) for i, layer in enumerate(module)]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(isinstance(layer, StreamableLayer) for layer in module)
    ]


def prove(layer: nn.Module) -> str | None:
    """Why a layer is not what its protocol says, or None: run whole and in chunks on its own tiny example, output and gradients agree.

    A copy in float64 is run, so that the bound holds whatever the training dtype; the layer itself and the generator stay untouched.
    """
    devices = {p.device for p in layer.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        try:
            return _difference_in_chunks(copy.deepcopy(layer).double().eval())
        except Exception as error:  # whatever it is, it is the reason: reported by name, never dropped
            return f"{type(error).__name__}: {error}"


def _difference_in_chunks(layer: nn.Module) -> str | None:
    x, arguments = layer.example(PROOF_TOKENS)
    x, arguments = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, (x, arguments))
    buffers = [b.clone() for b in layer.buffers()]
    whole = _outcome(layer, layer.forward, x, arguments)
    if any(not torch.equal(a, b) for a, b in zip(buffers, layer.buffers(), strict=True)):
        return "it changes its buffers in forward, and a streamed layer runs several times"
    if whole[0].shape != x.shape:
        return f"it turns {list(x.shape)} into {list(whole[0].shape)}, and hidden states must keep their shape"
    plan = Plan(chunk_tokens=PROOF_CHUNK, store_outputs=0.5, boundaries="tensor")
    segment = Segment(Chain(plan, DeviceStore()), [layer], [0], first=True, last=True)
    chunked = _outcome(layer, segment.forward, x, arguments)
    for name, a, b in zip(("output", "input gradient", "parameter gradients"), whole, chunked, strict=True):
        error = (a - b).norm() / a.norm().clamp_min(torch.finfo(a.dtype).tiny)
        if not error <= PROOF_BOUND:
            return f"its {name} in chunks of {PROOF_CHUNK} differs from the whole by {error:.1e}: something besides mix looks across tokens"
    return None


def _outcome(layer: nn.Module, forward: Callable[..., Tensor], x: Tensor, arguments: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the input, gradients of the parameters in one vector."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = forward(x, **arguments)
        generator = torch.Generator(x.device).manual_seed(1)
        dy = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    dx, *flat = (torch.zeros_like(t).flatten() if g is None else g.flatten() for t, g in zip(leaves, grads, strict=True))
    return y.detach(), dx, torch.cat(flat) if flat else x.new_zeros(0)
