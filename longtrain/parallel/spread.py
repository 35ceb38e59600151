"""`lt.apply` on a sequence that several processes share: who holds what, which way each layer goes, positions, labels and loss.

Every process gives the model the same whole `input_ids`, labels and `cu_seqlens`; each works on its part. The loss is that of the whole
sequence, on every process. Its gradients are those of a process's part: DDP and FSDP2 average them over the processes, and so the loss
counts once for each (`gradients="mean"`); with ``gradients="sum"`` they add up to the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from longtrain.parallel.cost import Choice, Shape, choose
from longtrain.parallel.layout import Shards, spread
from longtrain.parallel.mesh import Mesh
from longtrain.parallel.mixer import OverRanks
from longtrain.parallel.ranks import Ranks
from longtrain.parallel.settings import Parallel
from longtrain.plan import Plan
from longtrain.span import IGNORE_INDEX, Layout, Span
from longtrain.stream.replay import BareLayer, Mix, call_layer


class Sharing:
    """The processes of one `lt.apply`, and how the sequence of the present pass is spread over them."""

    def __init__(self, plan: Plan, parallel: Parallel, group, shapes: list[list[Shape]]) -> None:
        """`shapes`: those of each layer's mixers (`shapes_of`). Every process makes it, at the same time."""
        self.plan, self.parallel, self.shapes = plan, parallel, shapes
        size = Ranks.of(group).size if not isinstance(group, DeviceMesh) else group.size()
        fewest = min((shape.heads for of_layer in shapes for shape in of_layer), default=1)
        heads = parallel.heads or max(n for n in range(1, size + 1) if size % n == 0 and n <= fewest)
        self.mesh = Mesh.make(group, heads)
        if self.mesh.heads.size > fewest:
            raise ValueError(
                f"parallel: {self.mesh.heads.size} ranks cannot exchange {fewest} query heads; set parallel.heads to at most {fewest}"
            )
        self.present: OnRank | None = None

    def layout(self, tokens: int, cu_seqlens: Tensor | Sequence[int] | None = None) -> Layout:
        """In place of `Layout.make`: what this process holds of a sequence, from here on the present one.

        Raises ValueError, on every process, where they were given sequences of different lengths or documents.
        """
        whole, everyone = Layout.make(tokens, cu_seqlens), self.mesh.all
        mark = torch.tensor([tokens, crc32(repr(whole.edges).encode())])
        if not torch.equal(everyone.greatest(mark), -everyone.greatest(-mark)):
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
                f"the layers were given {tokens} tokens, which is not this process's part of a sequence: call the model itself with the "
                "whole sequence (lt.token_logprobs cannot be shared by processes yet)"
            )
        return self.present

    def shards(self, tokens: int) -> Shards:
        inside = self.parallel.layout
        if inside == "auto":
            inside = "contiguous" if self.mesh.ring.size == 1 else "striped"
        return spread(tokens, self.mesh.all.size, inside=inside, chunk_tokens=self.plan.chunk_tokens, stripe=self.parallel.stripe)

    def choice(self, shape: Shape, shards: Shards) -> Choice:
        return choose(
            shape, shards.tokens, heads=self.mesh.heads.size, ring=self.mesh.ring.size, chunks=len(shards.chunks),
            runs=len(shards.parts[0][0]), segment_layers=self.plan.segment_layers, way=self.parallel.way,
        )

    def explain(self, tokens: int) -> str:
        """For a sequence of `tokens`: each kind of layer, its way, and the bytes that a rank receives (forward + backward) by every way."""
        shards, mesh, lines = self.shards(tokens), self.mesh, {}
        if mesh.all.size == 1:
            return "one process has all tokens"
        for i, of_layer in enumerate(self.shapes):
            for shape in of_layer:
                lines.setdefault(str(self.choice(shape, shards)), []).append(str(i))
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


class _Total(torch.autograd.Function):
    """A number summed over processes. Each gets its own part's gradient, once for every process where gradients are averaged."""

    @staticmethod
    def forward(ctx, sharing: Sharing, part: Tensor) -> Tensor:
        ctx.factor = sharing.mesh.all.size if sharing.parallel.gradients == "mean" else 1
        return sharing.mesh.all.sum(part)

    @staticmethod
    def backward(ctx, dtotal: Tensor):
        return None, dtotal * ctx.factor


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

    def mixer(self, mixer: Any, layer: int, place: int) -> Any:
        mesh, shape = self.sharing.mesh, _as_asked(mixer, self.sharing.shapes[layer][place])
        self.sharing.shapes[layer][place] = shape
        rows = mixer.mask.rows if hasattr(mixer, "mask") else ()
        if any(len(row.documents.edges) > 2 for row in rows):
            raise ValueError(f"layer {layer}: a mask that cuts the sequence (chunked attention) cannot be spread over processes yet")
        if len(self.edges) > 2:
            mixer = mixer.with_documents(self.edges)
        if mesh.all.size == 1:
            return mixer
        plain = getattr(mixer, "base", mixer)
        if plain.dropout_p:  # the mask is a function of the seed, and of the first process's on all of them
            mixer = mixer.with_seed(int(mesh.all.first(torch.tensor(plain.dropout_seed))))
        way = self.sharing.choice(shape, self.shards).way
        return OverRanks(
            base=mixer, mesh=mesh.flat if way == "halo" else mesh, shards=self.shards, way=way, heads=(shape.heads, shape.kv_heads)
        )


def _as_asked(mixer: Any, shape: Shape) -> Shape:
    """With the window of a mixer: one longer than an example does not show there."""
    left = getattr(mixer, "base", mixer).window_size[0]
    return replace(shape, window=None if left < 0 else left + 1, causal=mixer.causal)


def shapes_of(layer: nn.Module, tokens: int) -> list[Shape]:
    """Of each mixer call of a streamable layer, seen on its example of `tokens`. Raises ValueError for mixers that cannot be spread."""
    found: list[Shape] = []
    with torch.random.fork_rng(devices={p.device for p in layer.parameters() if p.device.type == "cuda"}), torch.no_grad():
        x, arguments = layer.example(tokens)

        def seen(mixer, *inputs: Tensor) -> Tensor:
            if not hasattr(mixer, "attend_vjp"):
                raise ValueError(f"a {type(mixer).__name__} cannot be spread over processes yet; attention can")
            q, k, v = inputs
            shape = Shape(heads=q.shape[2], kv_heads=k.shape[2], head_dim=q.shape[3], value_dim=v.shape[3], itemsize=q.itemsize)
            found.append(_as_asked(mixer, shape))
            return mixer(q, k, v)

        call_layer(BareLayer(layer), x, arguments, Mix([partial(seen, mixer) for mixer in layer.mixers(**arguments)]), None)
    return found
