"""One call of a segment of streamed layers: what its forward pass must remember for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from longtrain.offload import Stored, TokenStore
from longtrain.plan import Plan
from longtrain.span import Span, chunk_spans
from longtrain.stream.protocol import Spread
from longtrain.stream.replay import (
    Arguments,
    BareLayer,
    GradientSums,
    LayerMixers,
    Mix,
    Parameters,
    RandomStates,
    Surroundings,
    call_layer,
    delivered,
)


class Sequenced(Protocol):
    """Hidden states or their gradient, by span: `longtrain.offload.Stored`, or a whole tensor."""

    def put(self, span: Span, tensor: Tensor) -> None: ...
    def get(self, span: Span) -> Tensor: ...
    def take(self, span: Span) -> Tensor: ...


class WholeTensor:
    """A tensor ``[B, T, ...]`` read or written span by span; made at the first `put` when none is given."""

    def __init__(self, tokens: int, tensor: Tensor | None = None) -> None:
        self._tokens, self.tensor = tokens, tensor

    def put(self, span: Span, part: Tensor) -> None:
        if len(span) == self._tokens:
            self.tensor = part
            return
        if self.tensor is None:
            self.tensor = part.new_empty(part.shape[0], self._tokens, *part.shape[2:])
        self.tensor[:, span.slice()] = part

    def get(self, span: Span) -> Tensor:
        return self.tensor[:, span.slice()]

    take = get


class Enough(Exception):
    """Raised out of a layer by its mixer when only the mixer's inputs were wanted: what follows need not run."""


def announce(store: TokenStore, order: Iterable[tuple[Sequenced, Span]], *, early: bool = False) -> None:
    """Tell the store what will be asked of it, in order; `early`: by who comes next, whose own announcement then leaves it out."""
    wanted = []
    for values, span in order:
        if isinstance(values, Stored) and span not in values.early:
            wanted.append((values.name, span))
            if early:
                values.early.add(span)
        elif isinstance(values, Stored) and not early:
            values.early.remove(span)
    store.prefetch(wanted)


@dataclass(slots=True, eq=False)
class Call:
    """The layers with their arguments, spans, mixers, random states and autocast, for one forward and at most one backward."""

    layers: Sequence[BareLayer]
    indices: Sequence[int]
    """The layers' numbers in the model, for per-layer plan settings."""
    plan: Plan
    store: TokenStore
    arguments: Arguments
    tokens: int
    device: torch.device
    check_replay: bool
    progress: Callable[[str, int, int], None] | None
    spread: Spread | None = None
    """Set where the sequence is spread over processes."""
    spans: list[Span] = field(init=False)
    parameters: Parameters = field(init=False)
    mixers: list[Sequence[Any]] = field(init=False)
    random: RandomStates = field(init=False)
    surroundings: Surroundings = field(init=False)
    states: Any = None
    """What the algorithm (causal or two-pass) keeps between forward and backward."""
    source: Stored | None = None
    """Between forward and backward, where hidden states stream: those that the layers were given."""
    before: Call | None = None
    """The call whose hidden states these layers were given, and whose backward pass comes next."""

    def __post_init__(self) -> None:
        self.spans = chunk_spans(self.tokens, self.plan.chunk_tokens) if self.spread is None else self.spread.spans
        self.arguments.check(self.tokens)
        self.parameters = Parameters(self.layers)
        whole = self.arguments.on(Span(0, self.tokens))
        with torch.no_grad():
            self.mixers = [self._over_ranks(i, layer.layer.mixers(**whole)) for i, layer in enumerate(self.layers)]
        self.random = RandomStates(self.device, choices=any(getattr(layer.layer, "chooses", False) for layer in self.layers))
        self.surroundings = Surroundings.capture(self.device)

    def run(self, layer: int, span: Span, x: Tensor, steps: Sequence[Callable], replica: Replica | None = None) -> Tensor:
        """One layer on one span, its mixer calls going to `steps`; under the replica's parameters and arguments, if given."""
        arguments = self.arguments.on(span, None if replica is None else replica.leaves)
        parameters = None if replica is None else self.parameters.named(layer, replica.parameters)
        return call_layer(self.layers[layer], x, arguments, Mix(steps), parameters)

    def live_mixers(self, layer: int, replica: Replica) -> Sequence[Any]:
        """The layer's mixers with their shared tensors (filters) in the graph of the replica's parameters; all else, such as the seed of
        dropout, is as the forward pass had it."""
        if not any(getattr(mixer, "shared", ()) for mixer in self.mixers[layer]):
            return self.mixers[layer]
        arguments = self.arguments.on(Span(0, self.tokens), replica.leaves)
        module = LayerMixers(self.layers[layer].layer)
        live = functional_call(module, self.parameters.named(layer, replica.parameters), (arguments,))
        pairs = zip(self.mixers[layer], live, strict=True)
        return [mixer.with_shared(*made.shared) if getattr(mixer, "shared", ()) else mixer for mixer, made in pairs]

    def kept(self, what: Literal["outputs", "kv"], layer: int) -> Span:
        """The tokens of a layer whose mixer outputs, or keys and values, are kept: whole chunks where processes share a sequence."""
        stored = self.plan.stored_outputs if what == "outputs" else self.plan.stored_kv
        if self.spread is None:
            return stored(self.indices[layer], self.tokens)
        first = stored(self.indices[layer], len(self.spans)).start
        return Span(self.spans[first].start if first < len(self.spans) else self.tokens, self.tokens)

    def _over_ranks(self, layer: int, mixers: Sequence[Any]) -> Sequence[Any]:
        if self.spread is None:
            return mixers
        return [self.spread.mixer(mixer, self.indices[layer], place) for place, mixer in enumerate(mixers)]

    def announce(self, order: Iterable[tuple[Sequenced, Span]], *, early: bool = False) -> None:
        """As `announce`, to this call's store."""
        announce(self.store, order, early=early)

    def over(self, spans: Iterable[Span], phase: str) -> Iterator[Span]:
        """The spans one by one, reported to `progress` as (spans done, spans in all) of this phase."""
        spans = list(spans)
        for done, span in enumerate(spans, 1):
            yield span
            if self.progress is not None:
                self.progress(phase, done, len(spans))


class Replica:
    """Detached stand-ins of a call's parameters and differentiable arguments, and the sums of their gradients.

    `tensors` are the originals in the order of the autograd Function's inputs: arguments, then parameters.
    """

    def __init__(self, call: Call, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        arguments = call.arguments.differentiable
        detached = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
        self.leaves = list(call.arguments.leaves)
        for i, replica in zip(arguments, detached, strict=False):
            self.leaves[i] = replica
        self.parameters = detached[len(arguments) :]
        self.wanted = [t for t in detached if t.requires_grad]
        self._slots = [i for i, want in enumerate(wanted) if want]
        self._tensors, self._sums = tensors, GradientSums(len(tensors))

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add the gradients of `wanted`."""
        for slot, grad in zip(self._slots, grads, strict=True):
            self._sums.add(slot, grad)

    def add_made(self, made: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Add what the gradients of tensors made of parameters (filters) come to, where they are."""
        pairs = [(t, g.to(t.dtype)) for t, g in zip(made, grads, strict=True) if t.requires_grad]
        if pairs and self.wanted:
            self.add(torch.autograd.grad([t for t, _ in pairs], self.wanted, [g for _, g in pairs], allow_unused=True))

    def gradients(self) -> list[Tensor | None]:
        """The sums, in the order and form in which the autograd Function returns them."""
        return [delivered(t, total) for t, total in zip(self._tensors, self._sums.totals, strict=True)]


def check_leaves(ys: Iterable[Tensor], known: Iterable[Tensor]) -> None:
    """Raise RuntimeError where `ys` came of a leaf that is not `known`, whose gradient would be lost: what a hook adds, say."""
    ids, seen, nodes = set(map(id, known)), set(), [y.grad_fn for y in ys]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad" and id(node.variable) not in ids:
            raise RuntimeError(
                f"a streamed layer makes use of a tensor of shape {list(node.variable.shape)} that wants a gradient and is neither a "
                "parameter of the layer nor an argument of it (a hook may have brought it in), so its gradient would be lost: register it "
                "as a parameter of the layer, or undo() the report"
            )
        nodes += [before for before, _ in node.next_functions]


def vjp(y: Tensor, dy: Tensor, leaf: Tensor, replica: Replica) -> Tensor | None:
    """Vector-Jacobian product of one replayed span: adds into the replica's sums, returns the gradient of `leaf` if that is wanted."""
    if not y.requires_grad:
        return torch.zeros_like(leaf) if leaf.requires_grad else None
    if not leaf.requires_grad:
        replica.add(torch.autograd.grad(y, replica.wanted, dy, allow_unused=True))
        return None
    dleaf, *grads = torch.autograd.grad(y, [leaf, *replica.wanted], dy, allow_unused=True)
    replica.add(grads)
    return torch.zeros_like(leaf) if dleaf is None else dleaf
