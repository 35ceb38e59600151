"""Put a plan on a model: find the layers that can be streamed, prove them on a tiny input, replace their `forward`, report.

    report = lt.apply(model, lt.Plan(chunk_tokens=4096))
    print(report)
    report.undo()

Layers are found by structure: an `nn.ModuleList` whose members satisfy `longtrain.stream.protocol.StreamableLayer`; in a transformers
model, those of `longtrain.hf`. `forward` is replaced on the layer instances (nothing is wrapped, parameter names stay), and only after
the layer has been proved: run whole and in chunks on its own `example`, with gradients, the two must agree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longtrain.nn.ends import TokenEmbed, TokenLoss
from longtrain.offload import DeviceStore, TieredStore, TokenStore
from longtrain.parallel.settings import Parallel
from longtrain.plan import Plan
from longtrain.proof import PROOF_TOKENS, prove
from longtrain.sharded import whole
from longtrain.stream.boundary import Boundary
from longtrain.stream.embed import streamed_token_embed
from longtrain.stream.loss import streamed_token_loss
from longtrain.stream.protocol import StreamableLayer
from longtrain.stream.replay import forward_of
from longtrain.stream.segment import Chain, Progress, Segment, is_streamed, same_arguments

if TYPE_CHECKING:
    from longtrain.parallel.spread import Sharing


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
    store: TokenStore = field(repr=False)
    """Where the streamed tensors live: the device, or the tiers of `plan.offload`."""
    sharing: Sharing | None = field(default=None, repr=False)
    """The processes that share every sequence; `sharing.explain(tokens)` says which way each layer goes."""
    entries: list[Entry] = field(default_factory=list)
    _chains: list[Chain] = field(default_factory=list, repr=False)
    _undo: list[Callable[[], Any]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give every module the `forward` it had before, and a transformers model its attention and loss; close the tiers."""
        while self._undo:
            self._undo.pop()()
        self.store.close()

    def on_progress(self, callback: Progress | None) -> None:
        """Call ``callback(phase, spans done, spans in all)`` after every span of every segment; None stops that."""
        for chain in self._chains:
            chain.progress = callback

    def check_replay(self, check: bool = True) -> None:
        """Compare the replayed mixer inputs with the forward's, bit for bit, and raise RuntimeError where they differ. For tests."""
        for chain in self._chains:
            chain.check_replay = check

    def _replace(self, module: nn.Module, forward: Callable) -> None:
        before = module.__dict__.get("forward")
        self._undo.append(partial(delattr, module, "forward") if before is None else partial(setattr, module, "forward", before))
        module.forward = forward

    def __str__(self) -> str:
        width = max((len(entry.name) for entry in self.entries), default=0)
        lines = [f"{entry.name:{width}}  {entry.became}{': ' + entry.why if entry.why else ''}" for entry in self.entries]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A module that might be streamed."""

    name: str
    layer: nn.Module
    refusal: str | None = None
    """Why it cannot be, where that is known before its proof."""
    call: Callable[..., Any] | None = None
    """``call(streamed, *args, **kwargs)``: how the model calls the layer, where that is not by the protocol."""
    leave: Callable[[], None] | None = None
    """What has to be done where it is not streamed."""
    kind: Hashable | None = None
    """Layers of the same kind have the same proof; None is a kind of its own."""
    starts: bool = False
    """Whether it is given something else than what the layer before it gave out."""
    counts: bool = True
    """Whether it is a layer of the model, and not the norm behind them."""
    given: dict[str, Any] | None = None
    """The arguments that it was traced with, of a transformers model."""
    promise: Callable[[Tensor, Boundary], Tensor] | None = None
    """What gives out the hidden states behind it so that they may stay in the token store; None gathers them."""


def apply(
    model: nn.Module, plan: Plan, *, store: TokenStore | None = None, group: Any = None, parallel: Parallel | None = None
) -> Report:
    """Stream `model`'s layers and head by `plan`, in place.

    Returns a printable report. Raises ValueError, with the model left as it was, when no layer can be streamed, when a layer fails its
    proof (unless ``plan.layer_fallback == "unstreamed"``), when one layer stands in two places, and when the model was applied already.
    `store`: a token store of one's own, closed by the report's `undo`; when not given, the one that the plan asks for.

    `group`: processes that share every sequence (a process group, or a device mesh with the dimensions cp_ring and cp_ulysses); all of
    them call this at the same time. `parallel` says how; given alone it means all processes. See `longtrain.parallel.spread`.
    """
    report = Report(plan, _open_store(model, plan) if store is None else store)
    try:
        _apply(model, report, group, parallel)
    except BaseException:
        report.undo()
        raise
    return report


def _apply(model: nn.Module, report: Report, group, parallel: Parallel | None) -> None:
    plan = report.plan
    if any(is_streamed(module) for module in model.modules()):
        raise ValueError("lt.apply was called on this model already: call undo() of its report first")
    runs = _find_layers(model) + _find_transformers_layers(model, report)
    layers = [candidate for run in runs for candidate in run]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of layers with token_args, mixers(), example() and forward(x, *, mix=None, ...): "
            "see longtrain.stream.protocol.StreamableLayer"
        )
    first_names: dict[int, str] = {}
    for candidate in layers:
        if (other := first_names.setdefault(id(candidate.layer), candidate.name)) != candidate.name:
            raise ValueError(f"{candidate.name} is the same module as {other}: a layer that is used twice cannot be streamed; copy it")
    plan.check_layers(sum(candidate.counts for candidate in layers))

    index, proved = 0, {}
    chains: list[list[tuple[int, Candidate]]] = []
    for run in runs:
        chains.append([])
        for candidate in run:
            refusal = candidate.refusal
            if not candidate.counts and (candidate.starts or not chains[-1]):
                _leave(report, candidate, "the layer before it is not streamed")
                continue
            if refusal is None:
                kind = id(candidate) if candidate.kind is None else candidate.kind
                refusal = proved[kind] = proved[kind] if kind in proved else prove(candidate.layer, model)
            if candidate.starts:
                chains.append([])
            if refusal is None:
                chains[-1].append((index, candidate))
            elif plan.layer_fallback == "error":
                alone = "" if group is None and parallel is None else ", and each process has whole sequences: leave out group and parallel"
                raise ValueError(
                    f'{candidate.name} cannot be streamed: {refusal}; Plan(layer_fallback="unstreamed") leaves it as it is{alone}'
                )
            else:
                _leave(report, candidate, refusal)
                chains.append([])
            index += candidate.counts
    if not any(candidate.counts for chain in chains for _, candidate in chain):
        raise ValueError(f"no layer of {type(model).__name__} can be streamed:\n{report}")
    if group is not None or parallel is not None:
        report.sharing = _share(model, report, [entry for chain in chains for entry in chain], group, parallel or Parallel())
    for chain in filter(None, chains):
        _stream_chain(report, chain)
    ends = {kind: [(name, m) for name, m in model.named_modules() if isinstance(m, kind)] for kind in (TokenEmbed, TokenLoss)}
    streams = plan.boundaries == "stream" and len(report._chains) == len(ends[TokenEmbed]) == len(ends[TokenLoss]) == 1
    chain = report._chains[0] if streams and all(entry.why == "" for entry in report.entries) else None
    for name, module in ends[TokenEmbed] if chain else ():
        report._replace(module, partial(streamed_token_embed, chain=chain))
        report.entries.append(Entry(name, "streamed embedding"))
    for name, module in ends[TokenLoss]:
        streamed = partial(streamed_token_loss, chunk_tokens=plan.loss_chunk_tokens, chain=chain)
        report._replace(module, streamed if report.sharing is None else partial(report.sharing.loss, streamed))
        report.entries.append(Entry(name, "streamed loss"))
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}
    report.entries.sort(key=lambda entry: places[entry.name])


def _share(model: nn.Module, report: Report, layers: Sequence[tuple[int, Candidate]], group, parallel: Parallel) -> Sharing:
    """Have the processes of a group share the sequences that `model` is given. Raises ValueError for what cannot be spread over them."""
    from longtrain.parallel.spread import Sharing, shapes_of  # with torch.distributed, which not every torch has

    if any(entry.became == "left as it is" for entry in report.entries):
        raise ValueError(
            "a layer that is not streamed sees the tokens of one process only: give each process whole sequences (leave out group and "
            f"parallel), or a model of which all layers are streamed:\n{report}"
        )
    shapes = []
    for layer in (candidate.layer for _, candidate in layers if candidate.counts):
        with whole(layer, model):
            shapes.append(shapes_of(layer, PROOF_TOKENS))
    sharing = model.longtrain_sharing = Sharing(report.plan, parallel, group, shapes)
    report._undo.append(partial(delattr, model, "longtrain_sharing"))
    if hasattr(model, "make_layout"):
        before, model.make_layout = model.make_layout, sharing.layout
        report._undo.append(partial(setattr, model, "make_layout", before))
        return sharing
    if "transformers" in sys.modules:
        from longtrain import hf

        if (pretrained := hf.pretrained_of(model)) is not None:
            hf.share(pretrained, [candidate.layer for _, candidate in layers], sharing, report._undo)
            return sharing
    raise ValueError(f"{type(model).__name__} has no make_layout, by which it would be told the positions that a process holds")


def _open_store(model: nn.Module, plan: Plan) -> TokenStore:
    offload, device = plan.offload, next((p.device for p in model.parameters()), torch.device("cpu"))
    if offload is None:
        return DeviceStore()
    return TieredStore(device, host_bytes=offload.host_bytes, disk=offload.disk, staging_bytes=offload.staging_bytes)


def _leave(report: Report, candidate: Candidate, why: str) -> None:
    if candidate.leave is not None:
        candidate.leave()
    report.entries.append(Entry(candidate.name, "left as it is", why))


def _stream_chain(report: Report, candidates: Sequence[tuple[int, Candidate]]) -> None:
    """Replace the forwards of layers that follow each other."""
    chain, k = Chain(report.plan, report.store), report.plan.segment_layers
    if report.sharing is not None:
        chain.spread = report.sharing.of
    if candidates[-1][1].promise is not None:
        chain.leave = candidates[-1][1].promise
    report._chains.append(chain)
    layers = [entry for entry in candidates if entry[1].counts]
    groups = [layers[at : at + k] for at in range(0, len(layers), k)] + [[entry] for entry in candidates if not entry[1].counts]
    for members in groups:
        if len(members) > 1 and (carrying := [c.name for _, c in members if getattr(c.layer, "state_bytes", 0)]):
            raise ValueError(
                f"{carrying[0]} carries states from chunk to chunk through its own cache, and the layers of a segment are given the same "
                "arguments; use Plan(segment_layers=1)"
            )
        given = [c.given for _, c in members if c.given is not None]
        if not all(same_arguments(arguments, given[0]) for arguments in given):
            names = f"{members[0][1].name} to {members[-1][1].name.rpartition('.')[2]}"
            raise ValueError(f"{names} would be one segment, and the model gives them different arguments (masks, rotary positions): use "
                             "Plan(segment_layers=1)")
        segment = Segment(
            chain, [c.layer for _, c in members], [i for i, _ in members], first=members is groups[0], last=members is groups[-1]
        )
        for position, (_, candidate) in enumerate(members):
            streamed = partial(segment.pass_through, position) if position else segment.forward
            if not candidate.counts:
                streamed = partial(_after_layers, chain, forward_of(candidate.layer), streamed)
            report._replace(candidate.layer, streamed if candidate.call is None else partial(candidate.call, streamed))
            place = f", segment of {len(members)}" if len(members) > 1 else ""
            report.entries.append(Entry(candidate.name, f"streamed{place}"))


def _after_layers(chain: Chain, whole: Callable[[Tensor], Tensor], streamed: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The norm behind the layers: streamed with them, whole where they ran whole (decoding)."""
    return whole(x) if chain.plan.boundaries == "stream" and chain.boundary is None else streamed(x)


def _find_layers(model: nn.Module) -> list[list[Candidate]]:
    return [
        [Candidate(f"{name}.{i}" if name else str(i), layer, call=getattr(layer, "call", None)) for i, layer in enumerate(module)]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(isinstance(layer, StreamableLayer) for layer in module)
    ]


def _find_transformers_layers(model: nn.Module, report: Report) -> list[list[Candidate]]:
    """Those of a transformers model, which is prepared on the way; none where transformers was never imported."""
    if "transformers" not in sys.modules:
        return []
    from longtrain import hf  # an extra: only for models that cannot exist without it

    if hf.pretrained_of(model) is None:
        return []
    adapted = hf.adapt(model, report.plan, PROOF_TOKENS, report._undo)
    if adapted.head is not None:
        name, why = adapted.head
        report.entries.append(Entry(name, "left as it is" if why else "streamed loss", why))
    return [
        [
            Candidate(
                found.name,
                found.module,
                found.refusal,
                call=None if found.adapted is None else found.adapted.call,
                leave=None if found.adapted is None else found.adapted.uninstall,
                kind=None if found.adapted is None else found.adapted.kind,
                given=None if found.adapted is None or not found.is_layer else found.adapted.arguments,
                starts=not found.follows,
                counts=found.is_layer,
                promise=None if found.is_layer or adapted.head is None or adapted.head[1] else hf.LazyHidden.behind,
            )
            for found in run
        ]
        for run in adapted.runs
    ]
