"""Layers of an 8B shape for gpu_check.py: one at 128K against the rival, one at 1M, all of them at 64K."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_check_shapes import Row, Sizes
from step_methods import keep_attention, sdpa
from step_process import memory, seconds
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import longtrain as lt
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.nn.decoder import DecoderLayer

TOKENS_PER_SECOND = {"layer": 2700, "long layer": 500}
"""Goals for a whole 8B model on an H100, at 128K and at 1M; a layer has a 32nd of the step."""


def config_of(shape: dict, layers: int) -> ModelConfig:
    return ModelConfig(vocab_size=shape["vocab"], num_layers=layers, hidden_size=shape["hidden"], intermediate_size=shape["ffn"],
                       num_heads=shape["heads"], num_kv_heads=shape["kv_heads"])


class OneLayer(nn.Module):
    """A layer where `lt.apply` finds it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        with torch.device(sizes.device):
            self.layers = nn.ModuleList([DecoderLayer(config_of(sizes.shape, 1), 0).to(torch.bfloat16)])

    def forward(self, x_BTE: Tensor, **arguments) -> Tensor:
        return self.layers[0](x_BTE, positions_BT=torch.arange(x_BTE.shape[1], device=x_BTE.device)[None], **arguments)


def inputs(sizes: Sizes, tokens: int) -> tuple[Tensor, Tensor]:
    """The layer's input and the gradient of its output: one tensor each, in bf16."""
    x = torch.randn(1, tokens, sizes.shape["hidden"], device=sizes.device, dtype=torch.bfloat16).requires_grad_()
    return x, torch.randn_like(x).detach()


def step_of(layer: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> None:
    x.grad = None
    layer.zero_grad(set_to_none=True)
    run(x).backward(dy)


def streamed(sizes: Sizes, chunk: int) -> OneLayer:
    layer = OneLayer(sizes)
    lt.apply(layer, lt.Plan(chunk_tokens=chunk, boundaries="tensor"))
    return layer


def rival(layer: OneLayer, x: Tensor) -> Tensor:
    """Selective checkpointing that keeps attention's outputs, its inputs offloaded to pinned memory by torch."""
    contexts = partial(create_selective_checkpoint_contexts, keep_attention)
    with save_on_cpu(pin_memory=x.is_cuda):
        return checkpoint(layer, x, use_reentrant=False, context_fn=contexts, mix=sdpa)


def measured(sizes: Sizes, layer: nn.Module, run: Callable[[Tensor], Tensor], tokens: int, repeats: int) -> tuple[float, float]:
    """(seconds, bytes above what stood before) of the layer's forward and backward; with repeats 0 the first run is the only one."""
    x, dy = inputs(sizes, tokens)
    times: list[float] = []
    step = partial(step_of, layer, run, x, dy)
    found = memory(lambda: times.append(seconds(step, torch.device(sizes.device))), torch.device(sizes.device))
    times = times if repeats == 0 else [seconds(step, torch.device(sizes.device)) for _ in range(repeats)]
    return min(times), found["peak"]


def layer_bytes(sizes: Sizes, tokens: int, per_token: int) -> int:
    s = sizes.shape
    weights = 2 * (2 * s["hidden"] ** 2 + 2 * s["hidden"] * s["hidden"] * s["kv_heads"] // s["heads"] + 3 * s["hidden"] * s["ffn"])
    return 4 * weights + per_token * tokens


def layer_rows(sizes: Sizes) -> Iterator[Row]:
    """The rival first, then chunks; the best of them is compared with it."""
    T = sizes.layer_tokens
    goal = T / (TOKENS_PER_SECOND["layer"] * 32)
    layer = OneLayer(sizes)
    # x, dx, y, dy, attention's q, k, v, out, and what the recomputed MLP keeps: 2 E + 3 F and their gradients.
    needed = layer_bytes(sizes, T, 2 * (12 * sizes.shape["hidden"] + 6 * sizes.shape["ffn"]))
    time, peak = None, None
    if (why := sizes.lacks(needed)) is not None:
        yield Row(section="layer", name=f"selective + offload, T {T:,}", note=why)
    else:
        time, peak = measured(sizes, layer, partial(rival, layer), T, sizes.repeats // 2)
        yield Row(section="layer", name=f"selective + offload, T {T:,}", measured=f"{time:.2f} s, {peak / 1e9:.2f} GB")
    del layer
    best = None
    for chunk in sizes.layer_chunks:
        layer = streamed(sizes, chunk)
        ours, held = measured(sizes, layer, layer, T, sizes.repeats // 2)
        best = min(ours, best or ours)
        note = f"{ours / time:.2f}x time, {held / peak:.2f}x memory of selective + offload" if time else ""
        yield Row(section="layer", name=f"streamed, chunk {chunk:,}, T {T:,}", measured=f"{ours:.2f} s, {held / 1e9:.2f} GB",
                  expected=f"{goal:.2f} s (2,700 tokens/s of 32 layers)", note=note)
        del layer
    if time:
        yield Row(
            section="layer",
            name=f"best chunk against selective + offload, T {T:,}",
            measured=f"{best / time:.2f}x time",
            expected="at most 1.00x",
            passed=sizes.judged(best <= time),
        )


def long_layer_rows(sizes: Sizes) -> Iterator[Row]:
    """One forward and one backward of a layer at a million tokens, without a warm-up: it is long enough."""
    T, s = sizes.long_tokens, sizes.shape
    kv = s["hidden"] * s["kv_heads"] // s["heads"]
    # x, dx, y, dy, stored outputs: 2 E each; K/V in bf16 and their gradients in float32.
    needed = layer_bytes(sizes, T, 10 * s["hidden"] + 12 * kv) + 6 * 2**30
    goal = T / (TOKENS_PER_SECOND["long layer"] * 32)
    name = f"streamed, chunk {sizes.layer_chunks[-1]:,}, T {T:,}"
    if (why := sizes.lacks(needed)) is not None:
        yield Row(section="long layer", name=name, note=why)
        return
    layer = streamed(sizes, sizes.layer_chunks[-1])
    short = sizes.layer_chunks[-1] * 2
    measured(sizes, layer, layer, short, 0)  # kernels are loaded and compiled
    time, peak = measured(sizes, layer, layer, T, 0)
    flop = 3.5 * 2 * s["hidden"] * T**2 + 4 * 2 * T * layer_bytes(sizes, 0, 0) / 8
    yield Row(
        section="long layer",
        name=name,
        measured=f"{time:.1f} s, {peak / 1e9:.1f} GB",
        expected=f"{goal:.0f} s (500 tokens/s of 32 layers)",
        passed=sizes.judged(time <= goal),
        note=f"{flop / time / 1e12:.0f} TFLOP/s of useful work",
    )


def model_rows(sizes: Sizes) -> Iterator[Row]:
    """Forward and backward of the whole shape by the plan that fits this GPU."""
    T, config = sizes.model_tokens, config_of(sizes.shape, sizes.shape["layers"])
    name = f"whole 8B shape, T {T:,}"
    with torch.device("meta"):
        weights = 2 * sum(p.numel() for p in LanguageModel(config).parameters())
    if (why := sizes.lacks(2 * weights + 12 * sizes.shape["hidden"] * T)) is not None:
        yield Row(section="model", name=name, note=why)
        return
    budget = f"{torch.cuda.mem_get_info()[0] * 0.95 / 2**30:.1f}GiB" if sizes.device == "cuda" else sizes.budget
    with torch.device(sizes.device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LanguageModel(config)
        finally:
            torch.set_default_dtype(default)
    try:
        plan = lt.plan(model, T, budget)
    except lt.InfeasibleBudget as error:
        yield Row(section="model", name=name, note=f"skipped: {error}".splitlines()[0])
        return
    lt.apply(model, plan)
    ids = torch.randint(0, config.vocab_size, (1, T), device=sizes.device)
    times: list[float] = []

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()

    device = torch.device(sizes.device)
    found = memory(lambda: times.append(seconds(step, device)), device)
    peak = (found["base"] if sizes.device == "cuda" else 0) + found["peak"]
    if sizes.judge_speed:
        times = [seconds(step, device)]  # the first run loaded the kernels
    ratio = peak / plan.predicted_peak
    yield Row(
        section="model",
        name=f"{name}, chunk {plan.chunk_tokens:,}",
        measured=f"{times[0]:.1f} s, {peak / 1e9:.1f} GB, {T / times[0]:.0f} tokens/s",
        expected=f"{plan.predicted_peak / 1e9:.1f} GB within 3%",
        passed=sizes.judged(0.97 <= ratio <= 1.03),
        note=f"outputs of {plan.store_outputs} of the tokens stored",
    )
