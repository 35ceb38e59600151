"""Streaming layers whose mixer sees the future (bidirectional attention, full-length convolution): token-local passes around it.

Forward: run the layer up to its mixer for all chunks, mix whole sequences by head or channel group, run the layer with the mixer's
output for all chunks. Backward: the same in reverse, each pass a replay of one chunk at a time:

    y/dy -> douts, dx, dparams;   for each mixer, last to first:  dinputs = vjp(mixer);   inputs/dinputs -> douts, dx, dparams

The mixer's inputs are stored group-major, in the tiers of `offload.kv`, and come to the device a group at a time; its output and the
gradients are on the device for one layer; never the token-local part of more than a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from longtrain.offload import Stored
from longtrain.span import Span
from longtrain.stream.call import Call, Enough, Replica, Sequenced, WholeTensor, check_leaves


def forward(call: Call, x: Sequenced, y: Sequenced, *, keep: bool) -> None:
    """``y[span] = layer(x[span])``, its mixers having seen all spans; with `keep`, x and the mixers' outputs stay for `backward`."""
    if len(call.layers) > 1:
        raise ValueError(
            f"layers {call.indices[0]} to {call.indices[-1]} form one segment and a mixer among them sees the future; "
            "use Plan(segment_layers=1)"
        )
    if any(module.training for module in call.layers[0].modules()):
        call.random.assign(call.spans)
    outs: list[Tensor] = []
    mixed: list[Sequence[Tensor]] = []
    for mixer in call.mixers[0]:
        mixed.append(_mix_whole(mixer, _collect_inputs(call, mixer, x, outs), last=True))
        outs.append(mixed[-1][0])
    for span in call.over(call.spans, "forward"):
        with call.random.restored(span):
            y.put(span, call.run(0, span, x.get(span) if keep else x.take(span), _given(outs, span)))
    if keep:
        call.states = [
            [Stored(call.store, f"layer {call.indices[0]} {name}") for name, _ in zip(("mixer output", "LSE"), of_mixer, strict=False)]
            for of_mixer in mixed
        ]
        if _keeps_outputs(call):
            for stored, tensor in zip(chain(*call.states), chain(*mixed), strict=True):
                stored.put(Span(0, call.tokens), tensor)


def backward(call: Call, replica: Replica, x: Sequenced, dy: Sequenced, dx: Sequenced, *, want_dx: bool) -> None:
    """``dx[span]`` for all spans and the replica's gradient sums."""
    whole = Span(0, call.tokens)
    stored = _keeps_outputs(call)
    inputs: list[MixerInputs] = []
    outs: list[Tensor] = []
    lses: list[Sequence[Tensor]] = []
    for i, mixer in enumerate(call.mixers[0]):
        inputs.append(_collect_inputs(call, mixer, x, outs, replica))
        with call.surroundings.restored():
            out, *lse = [kept.take(whole) for kept in call.states[i]] if stored else _mix_whole(mixer, inputs[i], last=False)
        outs.append(out)
        lses.append(lse)
    with torch.enable_grad(), call.surroundings.restored():
        mixers = call.live_mixers(0, replica)

    dx_sum = WholeTensor(call.tokens)
    douts = [torch.zeros_like(out) for out in outs]
    _pass(call, replica, x, outs, douts, dx_sum, want_dx, last=len(outs), cotangents=lambda span: [dy.take(span)])
    for i in reversed(range(len(outs))):
        with call.surroundings.restored():
            dinputs = _mix_whole_vjp(mixers[i], inputs.pop(), (outs[i], *lses[i]), douts[i], replica)
        outs[i] = None
        _pass(
            call, replica, x, outs, douts, dx_sum, want_dx, last=i, cotangents=lambda span, d=dinputs: [t[:, span.slice()] for t in d]
        )
    for span in call.spans:
        x.take(span)
        if want_dx:
            dx.put(span, dx_sum.get(span))
    call.states = None


def _keeps_outputs(call: Call) -> bool:
    """A mixer that sees the future has no last tokens: its output is kept whole (store_outputs = 1) or not at all."""
    return call.kept("outputs", 0) == Span(0, call.tokens)


def _pass(
    call: Call,
    replica: Replica,
    x: Sequenced,
    outs: list[Tensor],
    douts: list[Tensor],
    dx_sum: WholeTensor,
    want_dx: bool,
    *,
    last: int,
    cotangents: Callable[[Span], Sequence[Tensor]],
) -> None:
    """Replay every span up to mixer `last` (to the end where there is none) and add up the gradients of what it came from."""
    for span in call.over(reversed(call.spans), "backward"):
        leaf = x.get(span).detach().requires_grad_(want_dx)
        out_leaves = [out[:, span.slice()].detach().requires_grad_() for out in outs[:last]]
        captured: list[Tensor] = []

        def capture(*inputs: Tensor, into: list[Tensor] = captured) -> Tensor:
            into.extend(inputs)
            raise Enough

        with call.random.restored(span), call.surroundings.restored(), torch.enable_grad():
            steps = [*_as_steps(out_leaves), *([capture] if last < len(outs) else [])]
            try:
                captured = [call.run(0, span, leaf, steps, replica)]
            except Enough:
                pass
        pairs = [(t, g) for t, g in zip(captured, cotangents(span), strict=True) if t.requires_grad]
        if not pairs:
            continue
        inputs = [*([leaf] if want_dx else []), *out_leaves, *replica.wanted]
        if span is call.spans[-1]:
            check_leaves((t for t, _ in pairs), inputs)
        grads = list(torch.autograd.grad([t for t, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True))
        if want_dx:
            dleaf = grads.pop(0)
            dleaf = torch.zeros_like(leaf) if dleaf is None else dleaf
            dx_sum.put(span, dleaf if last == len(outs) else dx_sum.get(span) + dleaf)
        for dout in douts[:last]:
            if (grad := grads.pop(0)) is not None:
                dout[:, span.slice()] += grad
        replica.add(grads)


class MixerInputs:
    """A mixer's inputs over the whole sequence, stored group-major: what `by_group` cuts out for one group is joined and read alone."""

    def __init__(self, call: Call, mixer) -> None:
        self.call, self.mixer = call, mixer
        self.empty: tuple[Tensor, ...] = ()
        """The inputs without tokens: their shapes, for whoever cuts them into groups."""
        self._parts: dict[tuple[int, int], Stored] = {}

    def put(self, span: Span, inputs: Sequence[Tensor]) -> None:
        self.empty = tuple(t[:, :0] for t in inputs)
        index = self.call.indices[0]
        place = self.call.plan.place("kv", index, self.call.tokens)
        # The forward reads them too, so they are never compressed.
        exact = None if place is None else lambda span: replace(place(span), compress=False)
        for group, (_, _, parts) in enumerate(self.mixer.by_group(*inputs)):
            for i, part in enumerate(parts):
                if (group, i) not in self._parts:
                    self._parts[group, i] = Stored(self.call.store, f"layer {index} mixer input {i}, group {group}", exact)
                self._parts[group, i].put(span, part.contiguous())

    def groups(self, mixer, *, last: bool) -> Iterator[tuple[slice, object, list[Tensor]]]:
        """(slice of the output's axis 2, mixer, inputs) of every group; `last`: they are forgotten."""
        whole = Span(0, self.call.tokens)
        for group, (index, part, parts) in enumerate(mixer.by_group(*self.empty)):
            stored = [self._parts[group, i] for i in range(len(parts))]
            yield index, part, [s.take(whole) if last else s.get(whole) for s in stored]

    def whole(self, i: int) -> Tensor:
        """Memory for something of input i's shape."""
        empty = self.empty[i]
        return empty.new_empty(empty.shape[0], self.call.tokens, *empty.shape[2:])


def _collect_inputs(call: Call, mixer, x: Sequenced, outs: Sequence[Tensor], replica: Replica | None = None) -> MixerInputs:
    """The inputs of the mixer after those whose outputs are given."""
    whole = MixerInputs(call, mixer)

    for span in call.over(call.spans, "mixer inputs"):

        def capture(*inputs: Tensor, span: Span = span) -> Tensor:
            whole.put(span, inputs)
            raise Enough

        with torch.no_grad(), call.random.restored(span), call.surroundings.restored():
            try:
                call.run(0, span, x.get(span), [*_given(outs, span), capture], replica)
            except Enough:
                continue
    return whole


def _given(outs: Sequence[Tensor], span: Span) -> list[Callable[..., Tensor]]:
    return _as_steps([out[:, span.slice()] for out in outs])


def _as_steps(outs: Sequence[Tensor]) -> list[Callable[..., Tensor]]:
    return [lambda *inputs, out=out: out for out in outs]


def _mix_whole(mixer, inputs: MixerInputs, *, last: bool) -> Sequence[Tensor]:
    """The mixer's output over the whole sequence, by head or channel group, without a graph; from attention over ranks, which takes all
    heads at once, the LSE too. `last`: nobody needs the inputs any more."""
    out = None
    with torch.no_grad():
        for index, part, part_inputs in inputs.groups(mixer, last=last):
            if hasattr(part, "attend_whole"):
                return part.attend_whole(*part_inputs)
            if hasattr(part, "mix_into"):
                out = inputs.whole(0) if out is None else out
                part.mix_into(out[:, :, index], *part_inputs)
                continue
            part_out = part(*part_inputs)
            if out is None:
                out = part_out.new_empty(*part_out.shape[:2], inputs.empty[0].shape[2], *part_out.shape[3:])
            out[:, :, index] = part_out
    return (out,)


def _mix_whole_vjp(mixer, inputs: MixerInputs, mixed: Sequence[Tensor], dout: Tensor, replica: Replica) -> list[Tensor]:
    """Gradients of the mixer's inputs, by group; those of its shared tensors go on to the parameters they are made of."""
    dinputs = [inputs.whole(i).zero_() for i in range(len(inputs.empty))]
    dshared = [torch.zeros_like(t) for t in mixer.shared]
    # The same cut, of the values and of the sums that receive their gradients.
    values = inputs.groups(mixer.with_shared(*(t.detach() for t in mixer.shared)), last=True)
    sums = mixer.with_shared(*dshared).by_group(*dinputs)
    for (index, part, part_inputs), (_, dpart, dpart_inputs) in zip(values, sums, strict=True):
        if hasattr(part, "attend_whole_vjp"):
            return [d.to(x.dtype) for d, x in zip(part.attend_whole_vjp(dout, *part_inputs, *mixed), part_inputs, strict=True)]
        if hasattr(part, "vjp_into"):
            part.vjp_into(dout[:, :, index], part_inputs, dpart_inputs, dpart.shared)
            continue
        leaves = [t.detach().requires_grad_() for t in (*part_inputs, *part.shared)]
        with torch.enable_grad():
            out = part.with_shared(*leaves[len(part_inputs) :])(*leaves[: len(part_inputs)])
        for total, grad in zip((*dpart_inputs, *dpart.shared), torch.autograd.grad(out, leaves, dout[:, :, index]), strict=True):
            total += grad
    replica.add_made(mixer.shared, dshared)
    return dinputs
