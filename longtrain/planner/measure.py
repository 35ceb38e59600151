"""What `longtrain calibrate` measures of a device's compute, one function for each of the rates: the code that steps run, by itself."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longtrain import ops
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.ops.mixers import LongConvMixer
from longtrain.ops.state_mixers import LaCTMixer, LinearAttentionMixer
from longtrain.planner.rates import Named, Rates
from longtrain.span import Span
from longtrain.stream.loss import streamed_token_loss
from longtrain.stream.work import Counting

SECONDS = 0.6
"""Of each measurement, after one call that is not counted."""

UNCACHED = 64 << 20
"""Bytes that are more than the caches of most processors hold."""


def seconds_of(call: Callable[[], object], device: torch.device, at_least: float = SECONDS) -> float:
    """Of one call, the mean of as many as `at_least` seconds hold, three at least: a step goes through all that comes between, too."""
    call()
    took, began = [], time.perf_counter()
    while len(took) < 3 or time.perf_counter() - began < at_least:
        took.append(once(call, device))
    return statistics.mean(took)


def once(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of this call."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def made(device: torch.device) -> Iterator[tuple[int, float]]:
    """Bytes/s of new memory that is written once, beside that of writing it; six blocks at a time, more than a gap in old memory holds."""
    for size in (1 << 14, 1 << 15, 1 << 16, 1 << 17, 1 << 19, 1 << 21, 1 << 23):
        block = partial(torch.empty, size, dtype=torch.uint8, device=device)
        there = [block() for _ in range(6)]
        old = seconds_of(lambda: [b.fill_(0) for b in there], device, SECONDS / 8)
        new = seconds_of(lambda: [block().fill_(0) for _ in there], device, SECONDS / 8)
        yield size, 6 * size / max(new - old, 0.01 * new)


def products(device: torch.device, dtype: torch.dtype, shape: dict) -> Iterator[tuple[int, float]]:
    """Rows by a matrix of which one side is the size and the other four times that, as in a layer's MLP: forward and both gradients, of
    matrices in turn, UNCACHED bytes in all."""
    for size in shape["sizes"]:
        sides = ((shape["rows"], size), (4 * size, size), (shape["rows"], 4 * size))
        calls = []
        for _ in range(max(1, UNCACHED // (2 * dtype.itemsize * sum(a * b for a, b in sides)))):
            x, w, dy = (torch.randn(side, device=device, dtype=dtype) for side in sides)
            calls += [(x, w.T, torch.empty_like(dy)), (dy, w, torch.empty_like(x)), (dy.T, x, torch.empty_like(w))]
        flops = 2 * len(calls) * shape["rows"] * 4 * size * size
        yield size, flops / seconds_of(lambda calls=calls: [torch.mm(a, b, out=out) for a, b, out in calls], device)


def attention(device: torch.device, dtype: torch.dtype, shape: dict, *, backward: bool) -> Iterator[tuple[int, float]]:
    """Causal, four query heads on one of keys; FLOP of the pairs that are visible, without what a call takes however small it is."""
    tokens, heads = shape["tokens"], shape["heads"]
    for dim in shape["dims"]:
        flops = 4 * heads * dim * tokens * (tokens + 1) / 2 * (2.5 if backward else 1)
        call = attention_call(device, dtype, dim, backward=backward)
        took = seconds_of(attention_of(device, dtype, tokens, heads, dim, backward), device)
        yield dim, flops / max(took - call, took / 2)


def attention_call(device: torch.device, dtype: torch.dtype, dim: int, *, backward: bool) -> float:
    """Seconds of a call that has next to nothing to do."""
    return seconds_of(attention_of(device, dtype, 16, 4, dim, backward), device, SECONDS / 4)


def attention_of(device: torch.device, dtype: torch.dtype, tokens: int, heads: int, dim: int, backward: bool) -> Callable[[], object]:
    q, dout = (torch.randn(1, tokens, heads, dim, device=device, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(1, tokens, heads // 4, dim, device=device, dtype=dtype) for _ in range(2))
    if not backward:
        return lambda: ops.attention(q, k, v, causal=True, return_lse=True)
    out, lse = ops.attention(q, k, v, causal=True, return_lse=True)
    dk, dv = (torch.zeros(t.shape, device=device) for t in (k, v))
    return lambda: ops.attention_backward(dout, q, k, v, out, lse, dk=dk, dv=dv, causal=True)


def mixers(device: torch.device, dtype: torch.dtype, shape: dict) -> Named:
    """FLOP/s of what may stand in attention's place, heads of 64, as each counts its own work; " backward" of its backward pass."""
    tokens, heads, span = shape["tokens"], shape["heads"], Span(0, shape["tokens"])
    new = partial(torch.randn, device=device, dtype=dtype)
    q, k, v, dout = (new(1, tokens, heads, 64) for _ in range(4))
    k, beta, found = F.normalize(k, dim=-1), new(1, tokens, heads).sigmoid(), {}
    calls: list[tuple[Any, tuple[Tensor, ...]]] = [
        (
            LinearAttentionMixer(gated=decay is not None, delta=delta),
            (q, k, v, *(() if decay is None else (decay,)), *((beta,) if delta else ())),
        )
        for delta in (False, True)
        for decay in (None, F.logsigmoid(beta), F.logsigmoid(q))
    ]
    calls.append((LaCTMixer(weights=new(heads, 3, 64, 64), chunk_tokens=tokens), (q, k, v, new(1, tokens, heads, 3).sigmoid())))
    for mixer, inputs in calls:
        ((name, flops),) = mixer.work(*inputs).items()
        found[name] = flops(tokens) / seconds_of(lambda: mixer.step(span, None, *inputs), device, SECONDS / 4)
        back = lambda: mixer.step_vjp(span, None, inputs, dout, None)
        found[f"{name} backward"] = flops(tokens, backward=True) / seconds_of(back, device, SECONDS / 4)
    u_BTE, dy_BTE, du_BTE = (new(1, tokens, heads * 64) for _ in range(3))
    for name, taps in (("direct", 4), ("transformed", tokens)):
        mixer = LongConvMixer(filter=new(heads * 64, taps).float(), skip=new(heads * 64).float())
        name, flops = f"convolution, {name}", mixer.work(u_BTE)[f"convolution, {name}"]
        found[name] = flops(tokens) / seconds_of(lambda: mixer(u_BTE), device, SECONDS / 4)
        dshared = [torch.empty_like(t) for t in mixer.shared]
        back = lambda: mixer.vjp_into(dy_BTE, (u_BTE,), (du_BTE,), dshared)
        found[f"{name} backward"] = flops(tokens, backward=True) / seconds_of(back, device, SECONDS / 4)
    return tuple(sorted(found.items()))


def elementwise(device: torch.device, dtype: torch.dtype, elements: int) -> float:
    """Bytes/s of products and sums."""
    a, b, out = (torch.randn(elements, device=device, dtype=dtype) for _ in range(3))
    return 2 * 3 * a.nbytes / seconds_of(lambda: (torch.mul(a, b, out=out), torch.add(a, b, out=out)), device)


class Timing(Counting):
    """Seconds of every operation that is no product, again and again on what it was given, beside the bytes that are counted."""

    def __init__(self, tokens: int, device: torch.device, known: Rates) -> None:
        super().__init__(tokens)
        self._device, self._known = device, known
        self.seconds: Counter[str] = Counter()
        """Without what new memory costs."""
        self.each: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before, made = self.others.total(), len(self.made)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.others.total() > before:
            took = seconds_of(lambda: func(*args, **(kwargs or {})), self._device, SECONDS / 50)
            self.seconds[func._schema.name] += max(
                took / 20, took - self._known.new_memory((((0.0, size), 1) for size in self.made[made:]), 0)
            )
            self.each[func._schema.name] += 1
        return out


def operations(device: torch.device, dtype: torch.dtype, shape: dict, known: Rates) -> Named:
    """Bytes/s of each operation, forward and backward, of a layer of longtrain's, of what layers of transformers have, and of the loss.
    Left out are those which take no longer than the quickest of all: their number says what they cost (`launch`)."""
    tokens, width = shape["rows"], shape["width"]
    model = LanguageModel(
        ModelConfig(
            vocab_size=8 * width,
            num_layers=1,
            hidden_size=width,
            intermediate_size=4 * width,
            num_heads=width // 64,
            num_kv_heads=width // 64,
        )
    ).to(device, dtype)
    layer, targets_BT = model.model.layers[0], torch.zeros(1, tokens, dtype=torch.int64, device=device)
    x_BTE, arguments = layer.example(tokens)
    x_BTE.requires_grad_()
    with Timing(tokens, device, known) as timing:
        y_BTE = layer(x_BTE, **arguments, mix=lambda q, k, v: q + k + v) + _as_in_transformers(x_BTE)
        y_BTE.backward(y_BTE.detach())
        streamed_token_loss(y_BTE.detach().requires_grad_(), model.model.norm, model.lm_head, targets_BT, chunk_tokens=tokens).backward()
    least = min(seconds / timing.each[name] for name, seconds in timing.seconds.items())
    took = {name: seconds - timing.each[name] * least for name, seconds in timing.seconds.items()}
    return tuple(sorted((name, timing.others[name] / took[name]) for name, seconds in timing.seconds.items() if took[name] > seconds / 2))


def _as_in_transformers(x_BTE: Tensor) -> Tensor:
    """Its norm in float32 and its rotary positions, which are written out, and other activations."""
    wide_BTE = x_BTE.float()
    normed_BTE = (wide_BTE * torch.rsqrt(wide_BTE.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x_BTE.dtype)
    x_BHTD = normed_BTE.unflatten(-1, (-1, 64)).transpose(1, 2)
    turned_BHTD = torch.cat((-x_BHTD[..., 32:], x_BHTD[..., :32]), dim=-1)
    angles_TD = x_BHTD[0, 0].detach()
    turned_BTE = (x_BHTD * angles_TD.cos() + turned_BHTD * angles_TD.sin()).transpose(1, 2).reshape(x_BTE.shape)
    return F.gelu(turned_BTE, approximate="tanh") + F.gelu(normed_BTE) + normed_BTE.sigmoid()


def adamw(device: torch.device, elements: int) -> float:
    """Bytes/s of the fused update, 28 bytes a parameter."""
    weight = torch.nn.Parameter(torch.randn(elements, device=device))
    weight.grad = torch.randn_like(weight)
    update = torch.optim.AdamW([weight], fused=True).step
    return 28 * elements / seconds_of(update, device)

