"""`longtrain verify CONFIG`: is the streamed step of this config's model exact? Float64 against plain autograd, then the training dtype.

Lengths shrink together, so that the check takes seconds and still meets what breaks: at least five chunks, the last one ragged,
windows shorter than the sequence, three documents, masked labels, every stored range split inside a chunk. A model of transformers
keeps its family and kinds of layers, with its adapters and rotary positions, on random weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from longtrain.apply import apply
from longtrain.config import Config, Locations, load_config
from longtrain.config.hf import HfModelConfig
from longtrain.double import InDouble
from longtrain.nn import LanguageModel
from longtrain.offload import check_disk
from longtrain.plan import SPLITS, Offload, Plan, Split
from longtrain.planner.pretrained import layers_differ
from longtrain.span import Layout
from longtrain.stream.carry import is_causal

CHUNK = 24
TIER_BYTES = 64 * 2**20
"""Of each slower tier, where the config has any: the small model needs less."""
FLOAT64_BOUND = 1e-12
"""Relative norm per tensor: 1.1e-16 of rounding times the 10^4 terms, at most, of sums whose order changes."""
ROUNDINGS = 4
"""Or so many times what the model itself makes, one process and plain autograd, of one rounding of what each of its layers is given:
recurrences under random weights can take that further (`noise_of`)."""
DTYPE_BOUND = 2.0
"""In the training dtype the streamed gradient may be this many times as far from the float64 one as the plain gradient is."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    check: str
    value: str
    bound: str
    good: bool


def run(config_path: str, overrides: Sequence[str]) -> int:
    """Print the table and the verdict; 0 when everything holds, 1 otherwise."""
    config, where = load_config(config_path, overrides)
    plan, tokens = shrink_plan(config, where)
    torch.manual_seed(0)
    if isinstance(config.model, HfModelConfig):
        model, plan, said = shrink_transformers(config, plan, tokens, where)
    else:
        model, plan, said = shrink(config, plan, tokens)
    print(f"{config_path}: {config.data.seq_len} tokens shrink to {tokens}, chunks to {plan.chunk_tokens}")
    print(f"model: {said}\n")
    rows = []
    for row in check(model, plan, tokens, getattr(torch, config.train.dtype)):
        rows.append(row)
        print(f"{'ok  ' if row.good else 'FAIL'}  {row.check:58}  {row.value:>32}  {row.bound}", flush=True)
    failed = sum(not row.good for row in rows)
    print(f"\n{'exact' if not failed else f'NOT EXACT: {failed} of {len(rows)} checks failed'}")
    return 1 if failed else 0


def shrink_plan(config: Config, where: Locations) -> tuple[Plan, int]:
    """The config's plan for small chunks, and the tokens of as many of them. Raises ConfigError where its disk cannot be used."""
    settings = config.memory.plan_settings() if config.memory.chunk_tokens else {"chunk_tokens": config.data.seq_len}
    chunks = min(9, max(5, math.ceil(config.data.seq_len / settings["chunk_tokens"])))
    if settings.get("loss_chunk_tokens") or isinstance(config.model, HfModelConfig):
        settings["loss_chunk_tokens"] = CHUNK + 5
    if blocks := settings.get("kv_block_tokens"):
        settings["kv_block_tokens"] = CHUNK * min(2, blocks // settings["chunk_tokens"])
    if (tiers := config.memory.tiers()) is not None:
        settings["offload"] = _shrink_tiers(tiers, planned=config.memory.offload is None)
        if tiers.disk is not None:
            try:
                check_disk(settings["offload"].disk)
            except ValueError as error:
                raise where.explain(error, "memory.disk") from None
    return Plan(**{**settings, "chunk_tokens": CHUNK}), (chunks - 1) * CHUNK + 7


def _of_layers(plan: Plan, layers: int) -> Plan:
    """The plan of the first layers."""
    cut = {name: value[:layers] for name in ("store_outputs", "store_kv") if isinstance(value := getattr(plan, name), tuple)}
    return replace(plan, **cut)


def shrink(config: Config, plan: Plan, tokens: int) -> tuple[LanguageModel, Plan, str]:
    """A small float64 model in the proportions of the config's, the plan for its layers, and what it is."""
    model = config.model
    pattern = len(model.layers) if model.layers else 2 * len(model.window or (None,))
    layers = min(model.num_layers, max(2, pattern, plan.segment_layers + 1))
    ratio = model.num_heads // model.num_kv_heads
    kv_heads = min(model.num_kv_heads, 2)

    def shorter(length: int) -> int:
        return max(min(length, 5), length * tokens // config.data.seq_len)

    of_kinds = {"conv_taps": "conv", "lact_chunk": "lact"}
    lengths = {name: shorter(getattr(model, name)) for name, kind in of_kinds.items() if kind in (model.layers or ())}
    if model.window is not None:
        lengths["window"] = tuple(None if w is None or w >= config.data.seq_len else shorter(w) for w in model.window)
    shape = replace(
        model,
        vocab_size=min(model.vocab_size, 211),
        num_layers=layers,
        hidden_size=min(model.hidden_size, 64),
        intermediate_size=min(model.intermediate_size, 96),
        num_heads=kv_heads * ratio,
        num_kv_heads=kv_heads,
        head_dim=min(model.resolved_head_dim, 32),
        initializer_range=0.1,
        **lengths,
    )
    said = (
        f"{shape.num_layers} layers, width {shape.hidden_size}, {shape.num_heads} heads, {shape.num_kv_heads} kv heads of "
        f"{shape.resolved_head_dim}, {f'kinds {list(shape.layers)}, ' if shape.layers else ''}windows {shape.window}, "
        f"vocabulary {shape.vocab_size}"
    )
    return LanguageModel(shape).double(), _of_layers(plan, layers), said


def shrink_transformers(config: Config, plan: Plan, tokens: int, where: Locations) -> tuple[nn.Module, Plan, str]:
    """The same of `model.hf`: a model of its family with a layer of each kind and two at least, its widths where they are small."""
    from longtrain.train import pretrained

    def shrunk(text) -> None:
        kinds = getattr(text, "layer_types", None) or [None] * text.num_hidden_layers
        needed = max(kinds.index(kind) for kind in set(kinds)) + 1
        layers = min(text.num_hidden_layers, max(2, needed, plan.segment_layers + 1))
        window = getattr(text, "sliding_window", None)
        sizes = {"num_hidden_layers": layers, "vocab_size": min(text.vocab_size, 211), "initializer_range": 0.1}
        sizes |= {"layer_types": kinds[:layers]} if kinds[0] else {}
        sizes |= {"sliding_window": max(min(window, 5), window * tokens // config.data.seq_len)} if window else {}
        sizes |= {name: None for name in ("pad_token_id", "bos_token_id", "eos_token_id") if hasattr(text, name)}
        for name, value in sizes.items():
            if getattr(text, name, None) != value:  # kinds that follow from the number of layers cannot be set
                setattr(text, name, value)

    built = pretrained.build(config.model, config.data.seq_len, torch.float64, where, read_weights=False, change=shrunk)
    model = built.model.double()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)  # zeros would hide the gradients of lora_A
    text = model.config.get_text_config()
    if getattr(text, "_experts_implementation", None) is not None:
        text._experts_implementation = "eager"  # grouped products have no float64
    kinds = sorted(set(getattr(text, "layer_types", None) or ["full_attention"]))
    said = f"{model.config.model_type}, {text.num_hidden_layers} layers ({', '.join(kinds)}), width {text.hidden_size}, random weights"
    return model, _of_layers(plan, text.num_hidden_layers), said


def _shrink_tiers(tiers: Offload, *, planned: bool) -> Offload:
    """The tiers at a size for small models; where the planner would choose what leaves the device, everything does."""
    disk = tiers.disk and replace(tiers.disk, budget=min(tiers.disk.budget, TIER_BYTES), max_written=None)
    splits = dict.fromkeys(SPLITS, Split(host=0.0 if disk else 1.0)) if planned else {}
    return replace(
        tiers, disk=disk, host_bytes=min(tiers.host_bytes, TIER_BYTES), staging_bytes=min(tiers.staging_bytes, TIER_BYTES), **splits
    )


def check(model: nn.Module, plan: Plan, tokens: int, dtype: torch.dtype) -> Iterator[Row]:
    """The rows for a small float64 model, one by one."""
    own = isinstance(model, LanguageModel)
    shape = model.config if own else model.config.get_text_config()
    vocabulary, layers = shape.vocab_size, shape.num_layers if own else shape.num_hidden_layers
    ids = torch.randint(vocabulary, (1, tokens))
    labels = ids.clone()
    labels[:, : tokens // 5] = -100
    edges = (0, tokens // 4 + 1, tokens // 4 + 2, tokens)
    inputs = {"input_ids": ids, "labels": labels}
    if own:
        inputs["cu_seqlens"] = torch.tensor(edges, dtype=torch.int32)
    else:
        inputs |= {"position_ids": Layout(tokens, edges).positions()[None], "use_cache": False}
    exact = _step(model, inputs)
    if own and any(two_passes(layer, plan.chunk_tokens) for layer in model.model.layers):
        layers = 1  # such layers stand alone in their segments
    if not own and layers_differ(model):
        layers = 1
    limits, said = limits_of(model, inputs, exact), f"<= {FLOAT64_BOUND:.0e}"
    for name, variant in _variants(plan, layers):
        try:
            streamed = _streamed_step(model, variant, inputs)
        except (ValueError, RuntimeError) as refusal:  # a layer failed its proof, or a replay gave other bits
            yield Row(f"float64 gradients, {name}", str(refusal), said, False)
            return
        yield compared(f"float64 gradients, {name}", streamed, exact, limits)
    report = apply(model, plan)
    torch.manual_seed(1)
    with torch.no_grad(), throughout(model):
        loss_error = float(abs(model(**inputs).loss - exact["loss"]) / exact["loss"])
    report.undo()
    yield Row("float64 loss without gradients", f"{loss_error:.1e}", said, loss_error <= limits["loss"])

    low = copy.deepcopy(model).to(dtype)
    name = str(dtype).removeprefix("torch.")
    exact = _step(copy.deepcopy(low).double(), inputs)  # the same rounded weights
    plain_error = _overall(_step(low, inputs), exact)
    try:
        streamed = _streamed_step(low, plan, inputs)
    except RuntimeError as error:
        yield Row(f"{name}: replayed q, k, v are the forward's, bit for bit", str(error), "equal", False)
        return
    yield Row(f"{name}: replayed q, k, v are the forward's, bit for bit", "equal", "equal", True)
    error = _overall(streamed, exact)
    ratio = error / plain_error
    yield Row(f"{name} gradients against float64", f"{error:.1e}, {ratio:.2f}x plain's", f"<= {DTYPE_BOUND}x", ratio <= DTYPE_BOUND)


def limits_of(model: nn.Module, inputs: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """How far each tensor of a float64 step, `exact` by plain autograd, may be off, by norm."""
    if isinstance(model, LanguageModel):
        return dict.fromkeys(exact, FLOAT64_BOUND)
    return {name: max(FLOAT64_BOUND, ROUNDINGS * noise) for name, noise in noise_of(model, inputs, exact).items()}


def noise_of(model: nn.Module, inputs: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """How far each tensor of a plain step goes when what each layer is given is rounded once more."""
    generator = torch.Generator().manual_seed(1)

    def rounded(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x, *others = args
        return (x * (1 + (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1) * torch.finfo(x.dtype).eps / 2), *others), kwargs

    layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=lambda m: sum(p.numel() for p in m.parameters()))
    handles = [layer.register_forward_pre_hook(rounded, with_kwargs=True) for layer in layers]
    try:
        return _errors(_step(model, inputs), exact)
    finally:
        for handle in handles:
            handle.remove()


def throughout(model: nn.Module) -> AbstractContextManager:
    """Float64 also where a model of transformers in float64 asks for float32: families compute norms, rotation, recurrences and loss in it
    whatever the dtype, which rounds what is compared."""
    double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return InDouble() if double and not isinstance(model, LanguageModel) else nullcontext()


def two_passes(layer: nn.Module, chunk_tokens: int) -> bool:
    """Whether a mixer of a layer of ours sees the future, or so far back that it runs in two passes."""
    return not all(is_causal(mixer, chunk_tokens) for mixer in layer.mixers(**layer.example(1)[1]))


def _variants(plan: Plan, layers: int) -> Iterator[tuple[str, Plan]]:
    yield "the config's plan", plan
    split = replace(plan, store_outputs=0.45, store_kv=0.0)
    yield "outputs stored from inside a chunk", split
    yield "outputs and K/V stored from inside chunks", replace(split, store_kv=0.7)
    if layers > 1:
        yield "segments of 2 layers", replace(split, store_kv=0.7, segment_layers=2)
    other = "tensor" if plan.boundaries == "stream" else "stream"
    yield f"boundaries: {other}", replace(plan, boundaries=other, offload=None)
    yield "nothing stored", replace(plan, store_outputs=0.0, store_kv=0.0)


def _step(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(1)  # the same dropout
    model.zero_grad()
    with throughout(model):
        loss = model(**inputs).loss
        loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}}


def _streamed_step(model: nn.Module, plan: Plan, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    report = apply(model, plan)
    report.check_replay()
    try:
        return _step(model, inputs)
    finally:
        report.undo()


def compared(check: str, a: dict[str, Tensor], b: dict[str, Tensor], limits: dict[str, float]) -> Row:
    """The row of the tensor whose relative error is nearest to its limit, or farthest beyond it."""
    errors = _errors(a, b)
    name = max(errors, key=lambda name: errors[name] / limits[name])
    return Row(check, f"{errors[name]:.1e} ({name.removeprefix('model.')})", f"<= {limits[name]:.0e}", errors[name] <= limits[name])


def _errors(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """The relative error of each tensor. Gradients that are zero by mathematics (queries that see one key) are rounding noise on both sides
    and are held to the norm of all."""
    overall = torch.stack([g.norm() for g in b.values()]).norm()
    norms = {name: norm if (norm := g.norm()) > 1e-10 * overall else overall for name, g in b.items()}
    return {name: float((a[name] - b[name]).norm() / norms[name]) for name in b}


def _overall(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative error over all tensors together."""
    difference = torch.stack([(a[n].double() - b[n].double()).norm() for n in b]).norm()
    return float(difference / torch.stack([b[n].double().norm() for n in b]).norm())
