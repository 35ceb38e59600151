"""A decoder layer of transformers as a `longtrain.stream.protocol.StreamableLayer`, whatever its family.

Run on ``hidden[:, span]`` with its token-wise arguments cut alike, such a layer is one chunk, if nothing in it looks across tokens but
its calls of the attention interface. Which arguments run along the tokens, and what attention is asked for, are seen in a traced run
(`trace.py`); that the rest is true is proved before the layer is streamed (`longtrain.proof`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss

from longtrain.hf.attention import MaskedAttention, Options, draw_seed, packed
from longtrain.hf.mask import Mask
from longtrain.hf.observe import asks_for_tokens_before, attention_calls, gives_attention_the_same, states_through, with_mix
from longtrain.hf.router import Collected
from longtrain.hf.state import ChunkCache, Key, States, TokensBefore
from longtrain.sharded import plain_copy
from longtrain.span import Layout, Span
from longtrain.stream.call import Enough
from longtrain.stream.replay import Arguments

CU_SEQLENS = ("cu_seq_lens_q", "cu_seq_lens_k")
"""transformers' names for the document boundaries of packed rows (`FlashAttentionKwargs`)."""

PASSED_WHOLE = {*CU_SEQLENS, *inspect.signature(ForCausalLMLoss).parameters}
"""What may reach a layer beside its own arguments: these, and the loss's, which transformers passes everywhere and no layer reads."""

CUT = {"seq_idx": 1, "chunk_positions": 0, "begins": 0, "mixed": 1}
"""And what then runs along the tokens: the document of each, which comes with `CU_SEQLENS` for layers that are no attention; where a
chunk is, for the collection of router logits and for layers that number their tokens; for layers with states, where documents begin, and
what attention came to beforehand."""


class AdaptedLayer:
    """What is set on a layer instance: `token_args`, `mixers`, `example`, and a `forward` that takes `mix`. Nothing is wrapped."""

    def __init__(self, layer: nn.Module, x: Tensor, arguments: dict[str, Any], token_args: Mapping[str, int], outputs: int) -> None:
        self.layer, self.original = layer, layer.forward
        self.signature = inspect.signature(layer.forward)
        self.x, self.arguments, self.token_args, self.outputs = x, arguments, {**CUT, **token_args}, outputs
        self.attentions: list[tuple[nn.Module, dict[bool, Options]]] = []
        """The attention module of each call of the interface, and its options in evaluation and in training."""
        self.chooses = False
        """Whether it picks the largest of some scores, as routers pick experts: replays then choose as the forward pass did."""
        self.routers: list[tuple[nn.Module, int]] = []
        """The modules that give out router logits, and which of their outputs those are."""
        self.cache: str | None = None
        """The argument by which it takes the cache that its states go through, where it has states."""
        self.state_bytes = 0
        """What these come to, for one row."""
        self.attends_alone = True
        self.counts: str | None = None
        """The argument by which it takes the cache that it asks how many tokens came before, where its attention does."""
        self._over: Callable[[int], Any] | None = None
        self._routed: list[Tensor] | None = None
        self._before: dict[str, Any] = {}
        self._emitted: list[Tensor] = []

    def install(self) -> None:
        """Make the layer a streamable one, until `uninstall`."""
        protocol = ("token_args", "chooses", "mixers", "example", "copy_in_float64", "difference_from_eager", "forward")
        for name in (*protocol, "state_bytes", "counts", "take_turns", "original"):
            self._before[name] = self.layer.__dict__.get(name)
            setattr(self.layer, name, getattr(self, name))
        for router, place in self.routers:
            router.forward = partial(self._route, router.forward, place)

    def uninstall(self) -> None:
        """Make the layer what it was; no harm if it is already."""
        for name, before in self._before.items():
            if before is None:
                delattr(self.layer, name)
            else:
                setattr(self.layer, name, before)
        for router, _ in self.routers if self._before else ():
            del router.forward
        self._before.clear()

    def observe(self) -> None:
        """Run the layer and note each call of the attention interface, and what it keeps in a cache (`observe.py`)."""
        self.attentions, self.chooses = attention_calls(self.layer, self.original, self.x, self.arguments, self.mask)
        caches = [p.name for p in self.signature.parameters.values() if "Cache" in str(p.annotation) and self.arguments.get(p.name) is None]
        run = partial(self.original, self.x)
        if caches and (states := states_through(run, self.arguments, caches[0], attends=bool(self.attentions))):
            self.cache, self.state_bytes = caches[0], sum(state.nbytes for state in states.values()) // self.x.shape[0]
            names = [name for name in self.signature.parameters if name.endswith("attention_mask")]
            of_padding = [name for name in names if self.arguments.get(name) is None]
            self.token_args = {**dict.fromkeys(of_padding, 1), **self.token_args}  # ``[B, T]``; there was none in the traced run
            same = gives_attention_the_same(partial(self._in_document, self.x), self.arguments, states)
            self.attends_alone = len(self.attentions) < 2 and same
        elif caches and self.attentions and asks_for_tokens_before(run, self.arguments, caches[0], self.mask):
            self.counts = caches[0]

    def take_turns(self, over: Callable[[int], Any] | None) -> None:
        """From now on the processes of ``over(tokens)`` (`longtrain.parallel.spread.OnRank`) share sequences; None: no others do. Raises
        ValueError where they would have to take turns in attention."""
        if over is not None and not self.attends_alone:
            raise ValueError(f"{type(self.layer).__name__} attends to what its states have made, and keeps its states to itself, so "
                             "processes cannot share its sequences: give each process whole ones (leave out group and parallel)")
        self._over = over

    @property
    def mask(self) -> Mask | None:
        return _mask_of(self.arguments)

    @property
    def kind(self) -> tuple:
        """What a proof depends on: layers of one kind differ in weights and number only."""
        shapes = tuple((name, p.shape, p.dtype) for name, p in self.layer.named_parameters())
        plain = (bool, int, float, str, type(None))
        settings = tuple(
            (name, type(m), tuple((k, v) for k, v in vars(m).items() if isinstance(v, plain) and k != "layer_idx"))
            for name, m in self.layer.named_modules()
        )
        asked = tuple((options[False], options[True]) for _, options in self.attentions)
        seen = None if self.mask is None else (self.mask.causal, self.mask.window, self.mask.rows)
        return shapes, settings, asked, seen, tuple(self.token_args.items())

    def mixers(self, **arguments: Any) -> tuple[Any, ...]:
        mask = _mask_of(arguments)
        if mask is None:
            return ()
        mask.check()
        mask = packed(mask, *(arguments.get(name) for name in CU_SEQLENS))
        chosen = [options[module.training] for module, options in self.attentions]
        return tuple(MaskedAttention.make(mask, options, draw_seed(options)).simplest() for options in chosen)

    def example(self, tokens: int) -> tuple[Tensor, dict[str, Any]]:
        if self.x.shape[1] != tokens:
            raise ValueError(f"the layer was traced on {self.x.shape[1]} tokens, an example of {tokens} was asked for")
        if self.cache is not None:
            return self.x, self.arguments | self._carried(self.x, self.arguments)
        return self.x, self.arguments | ({} if self.counts is None else {"chunk_positions": torch.arange(tokens)})

    def forward(self, x: Tensor, *, mix: Callable[..., Tensor] | None = None, **arguments: Any) -> Tensor:
        if mix is not None:
            calls = iter(self.attentions)

            def mix_as_expected(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
                expected_module, expected = next(calls, (None, {}))
                if expected_module is not None and expected[module.training] != options:
                    raise RuntimeError(f"{type(module).__name__} now asks for {options}, and for {expected[module.training]} when it was "
                                       "traced; call undo() of the report, then lt.apply again")
                return mix(q, k, v)

            arguments = with_mix(arguments, mix_as_expected)
            if self.attentions and "states" in arguments and (self._over is not None or "begins" in arguments):
                arguments["mixed"] = self._mixed(x, arguments)
        collected, states, positions = (arguments.pop(name, None) for name in ("collected", "states", "chunk_positions"))
        span = None if positions is None else Span(int(positions[0]), int(positions[-1]) + 1)
        if self.counts is not None and span is not None:
            arguments[self.counts] = TokensBefore(span.start)
        self._routed = None if collected is None else []
        try:
            if states is None:
                y = _first(self.original(x, **arguments))
            else:
                y = states.run(span, x, Arguments(arguments, self.token_args), list(self.layer.parameters()), self._on_states)
            return y if collected is None else collected.chunk(span, self._routed, y)
        finally:
            self._routed = None

    def _mixed(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """What its attention comes to, which takes all processes and all documents at once, before its states take their turns."""
        mixed, mix = [], _mask_of(arguments).mix

        def note(*call: Any) -> None:
            mixed.append(mix(*call))
            raise Enough

        plain = {name: value for name, value in arguments.items() if name not in ("collected", "states", *CU_SEQLENS, *CUT)}
        try:
            self.original(x, **with_mix(plain, note))
        except Enough:
            if not mixed:
                raise
        return mixed[0]

    def _on_states(self, x: Tensor, arguments: dict[str, Any], before: dict[Key, Tensor]) -> tuple[Tensor, dict[Key, Tensor]]:
        """Output and the states behind, document by document: at the first token of one there are none before."""
        begins, cut, outs, tokens = arguments.pop("begins", None), Arguments(arguments, self.token_args), [], x.shape[1]
        if begins is None:
            return self._in_document(x, arguments, before)
        edges = [0, *(begins[1:].nonzero()[:, 0] + 1).tolist(), tokens]
        for first, behind in zip(edges, edges[1:], strict=False):
            span = Span(first, min(tokens, max(behind, first + 2)))  # a single token would be taken for decoding: with one that is dropped
            y, before = self._in_document(x[:, span.slice()], cut.on(span), {} if begins[first] else before)
            outs.append(y[:, : behind - first])
        return torch.cat(outs, dim=1), before

    def _in_document(self, x: Tensor, arguments: dict[str, Any], before: dict[Key, Tensor]) -> tuple[Tensor, dict[Key, Tensor]]:
        mixed, cache = arguments.get("mixed"), ChunkCache(before)
        arguments = {name: value for name, value in arguments.items() if name not in ("mixed", "seq_idx", *CU_SEQLENS)}
        if mixed is not None:
            arguments = with_mix(arguments, lambda *call: mixed)
        y = _first(self.original(x, **{**arguments, self.cache: cache}))
        cache.check_unchanged()
        return y, cache.after

    def _carried(self, x: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
        """What carries the states of one call from chunk to chunk, or from process to process."""
        tokens, keep = x.shape[1], torch.is_grad_enabled()
        states = States(keep=keep) if self._over is None else self._over(tokens).turns(self._states_of_one(x, arguments), keep=keep)
        return {"states": states, "chunk_positions": torch.arange(tokens)}

    def _documents(self, x: Tensor, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """At which of its tokens documents begin, where `CU_SEQLENS` say. Raises ValueError for what they cannot be given with."""
        cu_seqlens, tokens = arguments.get(CU_SEQLENS[0]), x.shape[1]
        if cu_seqlens is None and arguments.get("seq_idx") is not None:
            raise ValueError(f"seq_idx ends documents inside a row: give {' and '.join(CU_SEQLENS)} with it, or each document a row of its "
                             "own")
        if cu_seqlens is None:
            return {}
        if not self.attends_alone:
            raise ValueError(f"{CU_SEQLENS[0]} ends documents inside a row, and this layer attends to what its states have made: give each "
                             "document a row of its own")
        if self.routers and arguments.get("output_router_logits"):
            raise ValueError("output_router_logits=True: router logits are not collected where documents share a row and layers keep "
                             "states; leave it off, or give each document a row of its own")
        layout = Layout.make(tokens, cu_seqlens) if self._over is None else self._over(tokens).layout
        return {"begins": layout.positions() == 0}

    def _states_of_one(self, x: Tensor, arguments: dict[str, Any]) -> dict[Key, Tensor]:
        """The states behind one token: like those behind any, in the dtypes of this call."""
        devices = {x.device} if x.is_cuda else set()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            of_one = with_mix(Arguments(arguments, self.token_args).on(Span(0, 1)), _no_attention)
            return self._in_document(x.new_zeros(x.shape[0], 1, x.shape[2]), of_one, {})[1]

    def _route(self, forward: Callable[..., Any], place: int, *args: Any, **kwargs: Any) -> Any:
        """A router's `forward`; its logits are noted where they are collected."""
        out = forward(*args, **kwargs)
        if self._routed is not None:
            self._routed.append(out[place])
        return out

    def take_emitted(self) -> list[Tensor]:
        """The router logits of the last call, once."""
        emitted, self._emitted = self._emitted, []
        return emitted

    def call(self, streamed: Callable[..., Tensor], /, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """The layer's `forward` while it is streamed, as the model calls it. With a KV cache (decoding) the layer runs whole."""
        x, arguments = self.bind(args, kwargs)
        if any(isinstance(value, Cache) for value in arguments.values()):
            if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.layer.parameters())):
                raise ValueError("a KV cache was given in training: each chunk would be appended twice; pass use_cache=False")
            return self.original(x, **arguments)
        if getattr(self.layer, "gradient_checkpointing", False) and self.layer.training:
            raise ValueError("gradient checkpointing is on and this layer is streamed, which would recompute it twice: call "
                             "model.gradient_checkpointing_disable(), and set gradient_checkpointing=False in the trainer's arguments")
        for name, value in arguments.items():
            known = not isinstance(value, Tensor) or self.arguments.get(name) is not None or name in {*self.token_args, *PASSED_WHOLE, *CUT}
            if not known and (name in self.arguments or (x.shape[1] in value.shape and x.shape[1] > 1)):
                raise ValueError(f"the layer was given {name}, shape {list(value.shape)}, which it was not given when it was traced: "
                                 "longtrain does not know whether it runs along the tokens; leave it out")
        if self.cache is not None:
            arguments |= self._carried(x, arguments) | self._documents(x, arguments)
        if self.counts is not None:
            arguments["chunk_positions"] = torch.arange(x.shape[1])
        if self.routers and arguments.get("output_router_logits"):
            collected = Collected(*x.shape[:2], len(self.routers))
            y = streamed(x, **arguments | dict(collected=collected, chunk_positions=torch.arange(x.shape[1])))
            self._emitted = collected.behind(y)
        else:
            y = streamed(x, **arguments)
        return (y, *[None] * (self.outputs - 1)) if self.outputs else y

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states, and all other arguments by name."""
        return bind(self.signature, args, kwargs)

    def copy_in_float64(self) -> nn.Module:
        """The layer to be proved on; experts in the implementation that has float64."""
        layer = plain_copy(self.layer).double().eval()
        for module in layer.modules():
            if getattr(getattr(module, "config", None), "_experts_implementation", None) is not None:
                module.config._experts_implementation = "eager"
        return layer

    def difference_from_eager(self) -> str | None:
        """Why the layer under longtrain's attention is not the layer under its family's own eager attention, or None.

        Called on a `copy_in_float64`: a family whose attention does more than the interface is asked for shows here.
        """
        as_double = lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
        x, arguments = tree_map(as_double, (self.x, self.arguments))
        dense = {name: _additive(value, x) if isinstance(value, Mask) else value for name, value in arguments.items()}
        configs = {id(m.config): m.config for m in self.layer.modules() if hasattr(m, "config")}
        with torch.no_grad():
            ours = self.forward(x, **arguments)
            for config in configs.values():
                config._attn_implementation = "eager"
            theirs = self.forward(x, **dense)
            for config in configs.values():
                config._attn_implementation = "longtrain"
        error = float((ours - theirs).norm() / theirs.norm())
        return None if error <= 1e-5 else f"under longtrain's attention it differs from its own eager attention by {error:.1e}"


def _no_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    return v.new_zeros(*q.shape[:3], v.shape[3])


def _first(y: Tensor | tuple[Tensor, ...]) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


def _additive(mask: Mask, x: Tensor) -> Tensor:
    """The mask as eager attention adds it to its scores: 0 where visible, the dtype's lowest number elsewhere."""
    visible = mask.dense(x.shape[0]).to(x.device)
    return torch.zeros_like(visible, dtype=x.dtype).masked_fill(~visible, torch.finfo(x.dtype).min)


def bind(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """A call's first argument, and all others by the names of the signature."""
    bound = signature.bind(*args, **kwargs).arguments
    extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    bound.update(bound.pop(extra, {}) if extra else {})
    first = next(iter(signature.parameters))
    return bound.pop(first), bound


def _mask_of(arguments: Mapping[str, Any]) -> Mask | None:
    return next((value for value in arguments.values() if isinstance(value, Mask)), None)
