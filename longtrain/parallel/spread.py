"""`lt.apply` on a sequence that several processes share: who holds what, which way each layer goes, positions, labels and loss.

Every process gives the model the same whole `input_ids`, labels and `cu_seqlens`; each works on its part. The loss is that of the whole
sequence, on every process. Its gradients are those of a process's part: DDP and FSDP2 average them over the processes, and so the loss
counts once for each (`gradients="mean"`); with ``gradients="sum"`` they add up to the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from longtrain.ops.state_mixers import LinearAttentionMixer
from longtrain.parallel.conv_channels import ConvByChannels
from longtrain.parallel.conv_halo import ConvByHalo
from longtrain.parallel.cost import Choice, Shape, choose
from longtrain.parallel.cost_mixers import ConvShape, StateShape, TurnShape
from longtrain.parallel.exchange import LEAST, ROUNDS
from longtrain.parallel.layout import STRIPE, Shards, spread
from longtrain.parallel.mesh import Mesh, flattened
from longtrain.parallel.mixer import OverRanks
from longtrain.parallel.ranks import Ranks
from longtrain.parallel.settings import Parallel
from longtrain.parallel.states import StatesOverRanks
from longtrain.parallel.turns import States, Turns
from longtrain.plan import Plan
from longtrain.span import IGNORE_INDEX, Layout, Span
from longtrain.stream.replay import BareLayer, Mix, call_layer

AnyShape = Shape | ConvShape | StateShape | TurnShape


class Sharing:
    """The processes of one `lt.apply`, and how the sequence of the present pass is spread over them."""

    def __init__(self, plan: Plan, parallel: Parallel, group, shapes: list[list[AnyShape]]) -> None:
        """`shapes`: those of each layer's mixers (`shapes_of`). Every process makes it, at the same time."""
        self.plan, self.parallel, self.shapes = plan, parallel, shapes
        by_mesh = isinstance(group, DeviceMesh)
        everyone = Ranks.of(flattened(group) if by_mesh else group)
        for what, mine in (("plans", replace(plan, offload=None)), ("settings", parallel), ("models", shapes)):
            if not everyone.agree(mine):
                raise ValueError(
                    f"the processes that share sequences were given different {what} (process {everyone.rank}: {str(mine)[:200]}); give "
                    "all of them the same"
                )
        of_kind = lambda kind: [shape for of_layer in shapes for shape in of_layer if isinstance(shape, kind)]
        fewest = min((shape.heads for shape in of_kind(Shape) or of_kind(StateShape)), default=None)  # None: convolutions exchange channels
        heads = parallel.heads or max(n for n in range(1, everyone.size + 1) if everyone.size % n == 0 and n <= (fewest or 1))
        self.mesh = Mesh.make(everyone, group.size(1) if by_mesh else heads, parallel.machine)
        if fewest is not None and self.mesh.heads.size > fewest:
            raise ValueError(
                f"parallel: {self.mesh.heads.size} ranks cannot exchange {fewest} heads; set parallel.heads to at most {fewest}"
            )
        self.turns = bool(of_kind(TurnShape))
        self.inside = parallel.layout
        if self.inside == "auto":  # more stripes cost windows more halos, and turns of states are as many as there are stripes
            windows = any(isinstance(shape, Shape) and shape.window is not None for of_layer in shapes for shape in of_layer)
            self.inside = "contiguous" if self.turns or (self.mesh.ring.size == 1 and windows) else "striped"
        self.present: OnRank | None = None

    def layout(self, tokens: int, cu_seqlens: Tensor | Sequence[int] | None = None) -> Layout:
        """In place of `Layout.make`: what this process holds of a sequence, from here on the present one.

        Raises ValueError, on every process, where they were given sequences of different lengths or documents.
        """
        whole, everyone = Layout.make(tokens, cu_seqlens), self.mesh.all
        if not everyone.agree(tokens, whole.edges):
            raise ValueError(
                f"the processes that share a sequence were given different ones (process {everyone.rank}: {tokens} tokens in "
                f"{len(whole.edges) - 1} documents); give all of them the same batch"
            )
        self.present = OnRank(self, self.shards(tokens), whole.edges)
        return Layout(tokens, whole.edges, self.present.shards.spans(everyone.rank))

    def of(self, tokens: int) -> OnRank:
        """The present sequence, of which this process holds `tokens`. Raises ValueError where layers are given anything else."""
        if self.present is None or self.present.spans[-1].stop != tokens:
            raise ValueError(
                f"the layers were given {tokens} tokens, which is not this process's part of a sequence: call the model itself, or "
                "lt.token_logprobs, with the whole sequence"
            )
        return self.present

    def shards(self, tokens: int) -> Shards:
        size, stripe = self.mesh.all.size, self.parallel.stripe
        if stripe is None and self.mesh.ring.size == 1:
            stripe = max(STRIPE, LEAST // size, min(tokens, self.plan.chunk_tokens) // (size * ROUNDS))
        least = 2 if self.turns else 1  # given one token, a layer that keeps states takes it for decoding, and may edit them in place
        return spread(tokens, size, inside=self.inside, chunk_tokens=self.plan.chunk_tokens, stripe=stripe, least=least)

    def choice(self, shape: AnyShape, shards: Shards, beside: Sequence[AnyShape] = ()) -> Choice:
        """`beside`: all mixers of its layer."""
        mesh, parallel, segment_layers = self.mesh, self.parallel, self.plan.segment_layers
        if isinstance(shape, ConvShape):
            two_passes = any(not other.causal or self.choice(other, shards).way in ("ring", "channels") for other in beside)
            return shape.choose(shards, segment_layers=segment_layers, two_passes=two_passes, way=parallel.conv)
        if isinstance(shape, StateShape):
            return shape.choose(shards, heads=mesh.heads.size, way=parallel.states)
        if isinstance(shape, TurnShape):
            return shape.choose(shards)
        return choose(
            shape, shards.tokens, heads=mesh.heads.size, ring=mesh.ring.size, chunks=len(shards.chunks), runs=shards.runs,
            segment_layers=segment_layers, blocks=self.plan.kv_block_tokens is not None, way=parallel.way,
        )

    def explain(self, tokens: int) -> str:
        """For a sequence of `tokens`: each kind of layer, its way, and the bytes that a rank receives (forward + backward) by every way."""
        shards, mesh, lines = self.shards(tokens), self.mesh, {}
        if mesh.all.size == 1:
            return "one process has all tokens"
        for i, of_layer in enumerate(self.shapes):
            for shape in of_layer:
                lines.setdefault(str(self.choice(shape, shards, of_layer)), []).append(str(i))
        ranks = f"{mesh.all.size} ranks: heads over {mesh.heads.size}, {mesh.ring.size} groups"
        of_layers = [f"layers {', '.join(layers)}: {way}" for way, layers in lines.items()]
        return "\n".join([f"{tokens} tokens in {len(shards.chunks)} chunks over {ranks}", *of_layers])

    def loss(
        self, token_loss: Callable[..., Tensor], hidden_BTE: Tensor, norm: nn.Module, head: nn.Module, targets_BT: Tensor,
        *, normalizer: float | Tensor | None = None, reduction: str = "mean", **options: Any,
    ) -> Tensor:
        """In place of a model's token loss: the sum over processes of what each adds to it, divided by the targets of all."""
        if reduction == "mean" and normalizer is None:
            normalizer = self.mesh.all.sum((targets_BT != IGNORE_INDEX).sum()).clamp_min(1)
        loss = token_loss(hidden_BTE, norm, head, targets_BT, normalizer=normalizer, reduction=reduction, **options)
        return loss if reduction == "none" else self.total(loss)

    def total(self, part: Tensor) -> Tensor:
        """A number summed over processes; each gets the gradient of its own part."""
        return _Total.apply(self, part)

    def take(self, whole_BT: Tensor) -> Tensor:
        """The tokens of the present sequence that this process holds."""
        return self.present.shards.take(whole_BT, self.mesh.all.rank)

    def places(self, positions_N: Tensor) -> Tensor:
        """Where positions of the present sequence stand among the tokens that this process holds, -1 where another holds them."""
        return self.present.shards.layout(self.mesh.all.rank).places(positions_N)

    def join(self, part_BT: Tensor) -> Tensor:
        """A number for each token that this process holds -> those of the whole sequence, on every process, which gets the gradient of its
        own part."""
        return _Join.apply(self, part_BT)

    @property
    def weight(self) -> int:
        """How often the gradient of a process's part counts: once for every process, where they are averaged."""
        return self.mesh.all.size if self.parallel.gradients == "mean" else 1


class _Total(torch.autograd.Function):
    """A number summed over processes."""

    @staticmethod
    def forward(ctx, sharing: Sharing, part: Tensor) -> Tensor:
        ctx.sharing = sharing
        return sharing.mesh.all.sum(part)

    @staticmethod
    def backward(ctx, dtotal: Tensor):
        return None, dtotal * ctx.sharing.weight


class _Join(torch.autograd.Function):
    """The tokens of all processes out of those of each."""

    @staticmethod
    def forward(ctx, sharing: Sharing, part_BT: Tensor) -> Tensor:
        ctx.sharing, ctx.shards, everyone = sharing, sharing.present.shards, sharing.mesh.all
        shapes = [[torch.Size((part_BT.shape[0], ctx.shards.length(rank)))] for rank in range(everyone.size)]
        return ctx.shards.join([part for (part,) in everyone.all_to_all("tokens", [[part_BT]] * everyone.size, shapes)()])

    @staticmethod
    def backward(ctx, dwhole_BT: Tensor):
        return None, ctx.shards.take(dwhole_BT, ctx.sharing.mesh.all.rank) * ctx.sharing.weight


@dataclass(frozen=True, slots=True)
class OnRank:
    """`longtrain.stream.protocol.Spread` of one pass."""

    sharing: Sharing
    shards: Shards
    edges: tuple[int, ...]
    """Boundaries of the documents."""

    @property
    def spans(self) -> list[Span]:
        return self.shards.local_chunks(self.sharing.mesh.all.rank)

    @property
    def layout(self) -> Layout:
        """Positions and documents of the tokens that this process holds."""
        return self.shards.layout(self.sharing.mesh.all.rank, self.edges)

    def mixer(self, mixer: Any, layer: int, place: int) -> Any:
        """What mixes over the processes as `mixer`, number `place` of a layer, does alone."""
        sharing, mesh = self.sharing, self.sharing.mesh
        shape = sharing.shapes[layer][place] = _as_asked(mixer, sharing.shapes[layer][place])
        if len(self.edges) > 2:
            if any(not {*row.documents.edges} <= {*self.edges} for row in (mixer.mask.rows if hasattr(mixer, "mask") else ())):
                raise ValueError(
                    f"layer {layer}: documents packed under a mask that itself cuts the sequence (chunked attention) cannot be spread over "
                    "processes yet, as its cuts count from each document's start; give one document a row"
                )
            attends = hasattr(mixer, "with_documents")
            mixer = mixer.with_documents(self.edges) if attends else replace(mixer, documents=Layout(self.shards.tokens, self.edges))
        if mesh.all.size == 1:
            return mixer
        way = sharing.choice(shape, self.shards, sharing.shapes[layer]).way
        if isinstance(shape, ConvShape):
            return (ConvByHalo if way == "halo" else ConvByChannels)(base=mixer, ranks=mesh.all, shards=self.shards)
        if isinstance(shape, StateShape):
            return StatesOverRanks(base=mixer, mesh=mesh.flat if way == "scan" else mesh, shards=self.shards, heads=shape.heads)
        plain = getattr(mixer, "base", mixer)
        if plain.dropout_p:  # the mask is a function of the seed, and of the first process's on all of them
            mixer = mixer.with_seed(int(mesh.all.first(torch.tensor(plain.dropout_seed))))
        return OverRanks(
            base=mixer, mesh=mesh.flat if way == "halo" else mesh, shards=self.shards, way=way, heads=(shape.heads, shape.kv_heads)
        )


    def turns(self, like: States, *, keep: bool) -> Turns:
        """What hands on the states of a layer that keeps its own, in one pass. All processes make it, layer by layer."""
        return Turns(self.sharing.mesh.all, self.shards, like, keep=keep)


def _as_asked(mixer: Any, shape: AnyShape) -> AnyShape:
    """With what of a mixer an example does not show: a window that is longer, a filter that is as long as the sequence."""
    if isinstance(shape, ConvShape):
        return replace(shape, taps=mixer.filter.shape[1])
    if isinstance(shape, StateShape):
        return shape
    left = getattr(mixer, "base", mixer).window_size[0]
    return replace(shape, window=None if left < 0 else left + 1, causal=mixer.causal)


def shapes_of(layer: nn.Module, tokens: int) -> list[AnyShape]:
    """Of each mixer call of a streamable layer, seen on its example of `tokens`, and of states that it keeps itself. Raises ValueError for
    mixers that cannot be spread."""
    found: list[AnyShape] = []
    with torch.random.fork_rng(devices={p.device for p in layer.parameters() if p.device.type == "cuda"}), torch.no_grad():
        x, arguments = layer.example(tokens)

        def seen(mixer, *inputs: Tensor) -> Tensor:
            found.append(_shape(mixer, inputs))
            return mixer(*inputs)

        call_layer(BareLayer(layer), x, arguments, Mix([partial(seen, mixer) for mixer in layer.mixers(**arguments)]), None)
    states = getattr(layer, "state_bytes", 0)
    return [*found, TurnShape(state=states)] if states else found


def _shape(mixer: Any, inputs: Sequence[Tensor]) -> AnyShape:
    first = inputs[0]
    if hasattr(mixer, "attend_vjp"):
        q, k, v = inputs
        shape = Shape(heads=q.shape[2], kv_heads=k.shape[2], head_dim=q.shape[3], value_dim=v.shape[3], itemsize=q.itemsize)
        return _as_asked(mixer, shape)
    if hasattr(mixer, "filter"):
        filters, taps = mixer.filter.shape
        return ConvShape(
            channels=first.shape[2], filters=filters, taps=taps, itemsize=first.itemsize, causal=mixer.causal, gate_out=len(inputs) > 2
        )
    if hasattr(mixer, "step_vjp"):
        a_token = lambda *tensors: sum(t[0, 0].numel() * t.itemsize for t in tensors)
        wide = max(4, *(t.itemsize for t in inputs))
        return StateShape(
            heads=first.shape[2], inputs=a_token(*inputs), outputs=inputs[2][0, 0].numel() * first.itemsize,
            state=prod(mixer.state_shape(*inputs[1:])) * wide, affine=isinstance(mixer, LinearAttentionMixer),
        )  # fmt: skip
    raise ValueError(f"a {type(mixer).__name__} cannot be spread over processes yet: attention, convolutions and states can")
