"""Streaming exact backpropagation for causal layers (StreamBP, arXiv:2506.03077; here each key and value is differentiated once).

Forward, chunks in order, no graph. Backward, chunks in reverse order: replay the chunk with a graph and take its vector-Jacobian
product. When a chunk is replayed every later query has been handled, so the gradients of its keys and values are final: they enter
the replay's graph as they are, and each projection is differentiated once.

    for span in reversed(spans):
        y = layers(x[span])                          # graph of one chunk through the segment's k layers
        dx[span], dparams += vjp(y, dy[span])        # mixer node: dq = carry.mix_vjp(span, ...); dk, dv = carry.take_grad(span)

Cost, with A = attention forward and N = token-local forward of the segment, b = share of outputs stored: forward A + N; backward
2.5 A + 3 N, plus (1 - b)^2 A for one full-causal document or (1 - b) A for windows; restoring keys and values that are not stored
runs the layers up to the last one's projections once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from longtrain.offload import Stored
from longtrain.span import Span
from longtrain.stream.call import Call, Enough, Replica, Sequenced, check_leaves, vjp
from longtrain.stream.mixer_state import MixerState, Need

AHEAD = 2
"""Spans that the next segment begins with, which are fetched while the last span of this one runs."""


def forward(call: Call, x: Sequenced, y: Sequenced, *, keep: bool) -> None:
    """``y[span] = layers(x[span])`` for all spans; with `keep`, x and what else the plan stores stay for `backward`."""
    states = [[MixerState.make(call, layer, mixer) for mixer in mixers] for layer, mixers in enumerate(call.mixers)]
    for span in _announced(call, states, call.spans, "forward", lambda span: [(x, span)]):
        if span is call.spans[-1]:
            call.announce(((y, first) for first in call.spans[:AHEAD]), early=True)
        hidden = x.get(span) if keep else x.take(span)
        with call.random.recorded(span):
            for layer, mixer_states in enumerate(states):
                hidden = call.run(layer, span, hidden, [state.step(state.forward, span, keep=keep) for state in mixer_states])
        y.put(span, hidden)
    if keep:
        call.source = x if isinstance(x, Stored) else None
        for state in _all(states):
            state.store_carry()
        call.states = states


def backward(call: Call, replica: Replica, x: Sequenced, dy: Sequenced, dx: Sequenced, *, want_dx: bool) -> None:
    """``dx[span]`` for all spans, last to first, and the replica's gradient sums. x and dy are released as they are used."""
    _restore(call, replica, x)
    states = _all(call.states)
    needs = lambda span: [(x, span), *(n for s in states for n in s.needs(span)), (dy, span)]
    # Carries make the gradients of what is shared (filters) as they differentiate a span, and a node of no graph is never asked to.
    differentiable = want_dx or any(getattr(mixer, "shared", ()) for of_layer in call.mixers for mixer in of_layer)
    for span in _announced(call, call.states, call.spans[::-1], "backward", needs):
        if span is call.spans[0] and call.before is not None and want_dx:
            call.announce(_first_needs(call.before, dx), early=True)
        leaf = hidden = x.take(span).detach().requires_grad_(differentiable)
        with call.random.restored(span), call.surroundings.restored(), torch.enable_grad():
            for layer, mixer_states in enumerate(call.states):
                steps = [state.step(state.replay, span) for state in mixer_states]
                hidden = call.run(layer, span, hidden, steps, replica)
        if span is call.spans[-1]:
            check_leaves([hidden], [leaf, *replica.wanted])
        dleaf = vjp(hidden, dy.take(span), leaf, replica)
        if want_dx:
            dx.put(span, dleaf)
    for layer, mixer_states in enumerate(call.states):
        if any(hasattr(state.carry, "shared_grads") for state in mixer_states):
            with call.surroundings.restored(), torch.enable_grad():
                mixers = call.live_mixers(layer, replica)
            for mixer, state in zip(mixers, mixer_states, strict=True):
                if hasattr(state.carry, "shared_grads"):
                    replica.add_made(mixer.shared, state.carry.shared_grads())
    call.states = call.source = call.before = None


def _first_needs(call: Call, dy: Sequenced) -> list[Need]:
    """What the first spans of a call's backward pass will take from the store."""
    if call.source is None:
        return []
    (again, restored), states = _to_restore(call), _all(call.states)
    if restored:
        needs = lambda span: ((call.source, span), *(n for s in again for n in s.needs_to_restore(span)))
        return [need for span in restored[:AHEAD] for need in needs(span)]
    outputs = lambda span: (need for state in states for need in state.needs_of_outputs(span))
    return [need for span in call.spans[: -AHEAD - 1 : -1] for need in ((call.source, span), *outputs(span), (dy, span))]


def _to_restore(call: Call) -> tuple[list[MixerState], list[Span]]:
    """What runs again before the backward pass, for keys and values that were not kept: the mixers up to the last that misses some, and
    the spans up to the last."""
    states = _all(call.states)
    again = max((i + 1 for i, state in enumerate(states) if state.keep_written.start > 0), default=0)
    stop = max((state.keep_written.start for state in states), default=0)
    return states[:again], [span for span in call.spans if span.start < stop]


def _restore(call: Call, replica: Replica, x: Sequenced) -> None:
    """Fill the carries: from the store, and where keys and values were not stored by running the layers again, without a graph."""
    states = _all(call.states)
    for state in states:
        state.open_carry()
    again, restored = _to_restore(call)
    needs = lambda span: [(x, span), *(n for s in again for n in s.needs_to_restore(span))]
    for span in _announced(call, call.states, restored, "restore", needs):
        with call.random.restored(span), call.surroundings.restored():
            hidden = x.get(span)
            try:
                for layer, mixer_states in enumerate(call.states):
                    steps = [s.step(s.restore, span, stop=s is again[-1]) for s in mixer_states]
                    hidden = call.run(layer, span, hidden, steps, replica)
            except Enough:
                continue
    for i, state in enumerate(states):
        state.close_restoring(call.spans[len(restored) :] if i < len(again) else call.spans)


def _announced(
    call: Call, states: Sequence[Sequence[MixerState]], spans: Sequence[Span], phase: str, needs: Callable[[Span], Sequence[Need]]
) -> Iterator[Span]:
    """The spans one by one, after the store was told what they need: of all of them at once; where a carry fetches blocks of its own in
    between, which must find room, of the one under way and the next."""
    ahead = 1 if any(state.keeps for state in _all(states)) else len(spans)
    announced = 0
    for done, span in enumerate(call.over(spans, phase)):
        stop = max(announced, min(done + 1 + ahead, len(spans)))
        call.announce(need for s in spans[announced:stop] for need in needs(s))
        announced = stop
        yield span


def _all(states: Sequence[Sequence[MixerState]]) -> list[MixerState]:
    return [state for mixer_states in states for state in mixer_states]
