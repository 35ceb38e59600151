"""The rows of gpu_check.py, by section: generators of `Row`. Correctness sections first, then speed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu_check_attention import attention_speed_rows, ceiling_rows
from gpu_check_layers import layer_rows, long_layer_rows, model_rows
from gpu_check_mixers import conv_rows, conv_speed_rows, linear_rows, linear_speed_rows
from gpu_check_offload import race_rows
from gpu_check_shapes import Row, Sizes, relative
from step_methods import prepare
from step_process import StepProcess, Task, memory
from torch import Tensor

import longtrain as lt
from longtrain.nn import ModelConfig
from longtrain.ops.attention import attention
from longtrain.ops.attention import explain as explain_attention
from longtrain.ops.attention.select import BACKENDS as ATTENTION_BACKENDS
from longtrain.ops.linear_cross_entropy import linear_cross_entropy
from longtrain.ops.long_conv import long_conv


def outcome(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients, for an upstream gradient that is the same in every dtype."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(*leaves)
    upstream = torch.linspace(-1, 2, out.numel(), device=out.device).cos().to(torch.bfloat16).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def against(exact: list[Tensor], ours: list[Tensor]) -> tuple[float, float]:
    """Errors of the output and of the worst gradient."""
    return relative(ours[0], exact[0]), max(relative(a, b) for a, b in zip(ours[1:], exact[1:], strict=True))


# --- correctness -----------------------------------------------------------------------------------------------------------------


def attention_rows(sizes: Sizes) -> Iterator[Row]:
    """Every backend that takes a call, bf16, against float64: at most twice the error of the same formula in bf16 torch."""
    T, device = sizes.tokens, sizes.device
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, T, heads, sizes.head_dim, generator=g).to(device, torch.bfloat16)
        for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    )
    exact = outcome(lambda q, k, v: attention(q, k, v, causal=True, backend="reference"), [x.double() for x in (q, k, v)])
    yardstick = against(exact, outcome(_in_bf16, [q, k, v]))
    third, odd = T // 3, T - 37
    edges = torch.tensor([0, third, third + 1, T], dtype=torch.int32)
    cases = {
        "causal": ({}, T),
        "chunk at an offset": ({}, odd),
        "one query": ({}, 1),
        "not causal": ({"causal": False}, T),
        "window": ({"window_size": (T // 5, 0)}, T),
        "window, chunk": ({"window_size": (T // 5, 0)}, odd),
        "documents": ({"cu_seqlens_q": edges, "cu_seqlens_k": edges}, T),
        "softcap": ({"softcap": 3.0}, T),
        "queries that are not the last": ({"q_offset": T // 7}, odd),
        "strided blocks and window": ({"block_stride": (16, 4), "window_size": (T // 8, 0)}, T),
        "sink logits": ({"sink_logits": torch.randn(sizes.heads, generator=g).to(device)}, T),
        "partials fp32": ({"partials": "fp32"}, odd),
        "sink tokens and window": ({"sink_tokens": 4, "window_size": (T // 5, 0)}, T),
        "dropout": ({"dropout_p": 0.2, "dropout_seed": 7}, T),
        "deterministic": ({"deterministic": True}, T),
    }
    for case, (options, queries) in cases.items():
        arguments = {"causal": True, **options}
        inputs = [q[:, T - queries:], k, v]
        exact = outcome(lambda q, k, v: attention(q, k, v, backend="reference", **arguments), [x.double() for x in inputs])
        found = explain_attention(*inputs, **arguments)
        for backend in (name for name in ATTENTION_BACKENDS if name != "reference" and name not in found.refusals):
            errors = against(exact, outcome(lambda q, k, v: attention(q, k, v, backend=backend, **arguments), inputs))
            allowed = [2 * e for e in yardstick]
            yield Row(section="attention", name=f"{case}: {backend}{' (auto)' if backend == found.chosen else ''}",
                      measured=f"{errors[0]:.1e}, gradients {errors[1]:.1e}", expected=f"at most {allowed[0]:.1e}, {allowed[1]:.1e}",
                      passed=errors[0] <= allowed[0] and errors[1] <= allowed[1])


def _in_bf16(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
    """Causal attention as one writes it down, in the inputs' dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return (torch.softmax(scores.float().masked_fill(hidden, -torch.inf), -1).to(q.dtype) @ v).transpose(1, 2)


def op_rows(sizes: Sizes) -> Iterator[Row]:
    """The other ops in float32 and bf16 against float64."""
    g, device = torch.Generator().manual_seed(0), sizes.device
    N, E, V = sizes.tokens + 3, 8 * sizes.head_dim, 40 * sizes.head_dim + 1
    target = torch.randint(0, V, (N,), generator=g).to(device)
    target[::5] = -100
    for dtype, allowed in ((torch.float32, 2e-5), (torch.bfloat16, 2 * torch.finfo(torch.bfloat16).eps)):
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(device, dtype)

        trials = {
            "linear_cross_entropy": (lambda x, w, backend: linear_cross_entropy(x, w, target, backend=backend, chunk_tokens=N // 3),
                                     [random(N, E), random(V, E)]),
            "linear_cross_entropy, softcap, z-loss": (
                lambda x, w, backend: linear_cross_entropy(x, w, target, softcap=20.0, z_loss=1e-3, backend=backend, chunk_tokens=N // 3),
                [random(N, E), random(V, E)]),
            "long_conv, gated": (lambda u, k, a, b, backend: long_conv(u, k, None, a, b, backend=backend),
                                 [random(1, 257, 8), random(8, 257), random(1, 257, 8), random(1, 257, 8)]),
        }
        for name, (call, inputs) in trials.items():
            exact = outcome(lambda *x: call(*x, backend="reference"), [x.double() for x in inputs])
            errors = against(exact, outcome(lambda *x: call(*x, backend="auto"), inputs))
            yield Row(section="ops", name=f"{name}, {str(dtype)[6:]}", measured=f"{errors[0]:.1e}, gradients {errors[1]:.1e}",
                      expected=f"at most {allowed:.1e}", passed=max(errors) <= allowed)


def streamed_rows(sizes: Sizes) -> Iterator[Row]:
    """The streamed step against plain autograd: equal in float64; in bf16 no further from float64 than plain bf16 twice over."""
    config = ModelConfig(vocab_size=8 * sizes.head_dim, num_layers=3, hidden_size=4 * sizes.head_dim, intermediate_size=8 * sizes.head_dim,
                         num_heads=4,
                         num_kv_heads=2, window=(None, sizes.tokens // 4, None))
    T = sizes.tokens // 2 + 3
    ids = torch.randint(0, config.vocab_size, (1, T), generator=torch.Generator().manual_seed(1)).to(sizes.device)

    def gradients(method: str, dtype: torch.dtype, weights: dict | None = None) -> tuple[dict[str, Tensor], dict]:
        model, step = prepare(method, config, lt.Plan(chunk_tokens=T // 5), device=sizes.device, dtype=dtype)
        if weights is not None:
            model.load_state_dict(weights)
        step(ids).backward()
        return {name: p.grad for name, p in model.named_parameters()}, model.state_dict()

    plain64, _ = gradients("plain", torch.float64)
    for settings in ("", ":store_outputs=0.4", ":store_outputs=0,store_kv=0.7", ":segment_layers=2,store_kv=1.0", ":boundaries=tensor"):
        ours, _ = gradients("streamed" + settings, torch.float64)
        worst = max(relative(ours[name], plain64[name]) for name in plain64)
        yield Row(section="streamed", name=f"float64{settings}", measured=f"{worst:.1e}", expected="at most 1e-12", passed=worst <= 1e-12)
    plain16, weights = gradients("plain", torch.bfloat16)
    exact, _ = gradients("plain", torch.float64, weights)
    allowed = 2 * _whole(plain16, exact)
    for settings in ("", ":store_outputs=0", ":segment_layers=3,store_kv=1.0"):
        error = _whole(gradients("streamed" + settings, torch.bfloat16)[0], exact)
        yield Row(section="streamed", name=f"bfloat16{settings}", measured=f"{error:.1e}", expected=f"at most {allowed:.1e}",
                  passed=error <= allowed)


def _whole(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    return relative(torch.cat([ours[n].flatten().double() for n in exact]), torch.cat([g.flatten().double() for g in exact.values()]))


def replay_rows(sizes: Sizes) -> Iterator[Row]:
    """What the backward pass computes again is, bit for bit, what the forward pass had."""
    config = ModelConfig(vocab_size=8 * sizes.head_dim, num_layers=2, hidden_size=4 * sizes.head_dim, intermediate_size=8 * sizes.head_dim,
                         num_heads=4, num_kv_heads=2)
    T, compiler = sizes.tokens + 5, "inductor" if sizes.device == "cuda" else "aot_eager"
    ids = torch.randint(0, config.vocab_size, (1, T), generator=torch.Generator().manual_seed(1)).to(sizes.device)
    for how in ("eager", "compiled"):
        torch.manual_seed(0)
        model = lt.nn.LanguageModel(config).to(sizes.device, torch.bfloat16)
        if how == "compiled":  # the parts between the carry's operations
            for layer in model.model.layers:
                for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
                    part.compile(backend=compiler, dynamic=False)
        report = lt.apply(model, lt.Plan(chunk_tokens=T // 4, store_outputs=0.5, segment_layers=2))
        report.check_replay()
        try:
            model(input_ids=ids, labels=ids).loss.backward()
        except RuntimeError as error:
            yield Row(section="replay", name=f"bfloat16, {how}", measured=str(error).splitlines()[0][:90], expected="bitwise", passed=False)
        else:
            yield Row(section="replay", name=f"bfloat16, {how}", measured="bitwise", expected="bitwise", passed=True)


# --- speed and memory ------------------------------------------------------------------------------------------------------------


def memory_rows(sizes: Sizes) -> Iterator[Row]:
    """What lt.plan predicts against what a step takes."""
    s = sizes.step
    config = ModelConfig(vocab_size=s["vocab"], num_layers=s["layers"], hidden_size=s["hidden"], intermediate_size=s["ffn"],
                         num_heads=s["heads"],
                         num_kv_heads=s["kv_heads"])
    with torch.device(sizes.device):
        model = lt.nn.LanguageModel(config).to(torch.bfloat16)
    plan = lt.plan(model, s["tokens"], sizes.budget)
    lt.apply(model, plan)
    ids = torch.randint(0, s["vocab"], (1, s["tokens"]), device=sizes.device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()

    step()
    model.zero_grad(set_to_none=True)
    found = memory(step, torch.device(sizes.device))
    peak = (found["base"] if sizes.device == "cuda" else 0) + found["peak"]
    ratio = peak / plan.predicted_peak
    yield Row(section="memory", name=f"T {s['tokens']:,}, chunk {plan.chunk_tokens:,}: predicted peak",
              measured=f"{peak / 1e9:.3f} GB ({ratio:.3f}x)",
              expected=f"{plan.predicted_peak / 1e9:.3f} GB within 3%", passed=sizes.judged(0.97 <= ratio <= 1.03))


def step_rows(sizes: Sizes) -> Iterator[Row]:
    """A step's memory and time: streamed against checkpointing and selective checkpointing; gradients compared first."""
    from bench_step import disagreements

    s = dict(sizes.step)
    task = Task(**s, head_dim=None, window=None, tie_embeddings=False, batch=1, dtype="bfloat16", device=sizes.device, plan="",
                warmup_tokens=None)
    methods = ("checkpoint+chunked", "selective+chunked", "streamed", "streamed:store_outputs=0")
    found, outcomes = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for index, method in enumerate(methods):
            with StepProcess(task, method, {}, Path(scratch) / f"{index}.pt") as process:
                outcomes[method] = process.ask("warm-up with gradients")
                peak = process.ask("memory")["peak"]
                times = sorted(process.ask("time")["wall"] for _ in range(3))
            found[method] = peak, times[1]
            if index:
                wrong = disagreements({m: outcomes[m] for m in (methods[0], method)}, "bfloat16")
                yield Row(section="step", name=f"{method}: gradients", measured="; ".join(wrong[:2]) or "agree",
                          expected=f"those of {methods[0]}", passed=not wrong)
            ratios = ", ".join(
                f"{peak / found[m][0]:.2f}x mem {times[1] / found[m][1]:.2f}x time of {m.split('+')[0]}"
                for m in methods[:2] if m in found and m != method
            )  # fmt: skip
            streamed_fast = method == "streamed"
            most, longest = found["selective+chunked"] if streamed_fast else (0, 0)
            good = times[1] <= 1.0 * longest and peak <= 0.4 * most if streamed_fast else None
            yield Row(section="step", name=f"{method}, T {s['tokens']:,}", measured=f"{peak / 1e9:.2f} GB, {times[1]:.2f} s",
                      expected="time 1.0x, memory 0.4x of selective" if streamed_fast else "",
                      passed=None if good is None else sizes.judged(good), note=ratios)


def offload_rows(sizes: Sizes) -> Iterator[Row]:
    """Activation offload: races between transfers and kernels."""
    for name, measured, expected, passed in race_rows(sizes.device):
        yield Row(section="offload", name=name, measured=measured, expected=expected, passed=passed)


SECTIONS = {
    "attention": attention_rows, "ops": op_rows, "long conv": conv_rows, "linear": linear_rows, "streamed": streamed_rows,
    "replay": replay_rows, "offload": offload_rows,
    "ceilings": ceiling_rows, "attn speed": attention_speed_rows, "layer": layer_rows, "long layer": long_layer_rows, "model": model_rows,
    "memory": memory_rows, "step": step_rows, "conv speed": conv_speed_rows, "linear speed": linear_speed_rows,
}
SPEED_SECTIONS = ("ceilings", "attn speed", "layer", "long layer", "model", "memory", "step", "conv speed", "linear speed")
