"""What a run needs before its first update, made from its configuration: device, data, model, plan."""

from __future__ import annotations

import math
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import longtrain as lt
from longtrain._extension import MISSING
from longtrain.config import Config, Locations
from longtrain.config.schema import DataConfig, LengthStage
from longtrain.data.baselines import Baselines, compute_baselines
from longtrain.data.packing import Batch, PackedDocuments
from longtrain.data.sources import VOCABULARY, Document, check_vocabulary, read_stdlib, read_text, split_documents
from longtrain.nn import LanguageModel
from longtrain.nn.rotary import RotaryEmbedding
from longtrain.train.flops import RULE, measure_rate
from longtrain.train.optimizer import Optimizer
from longtrain.train.weights import load_weights
from longtrain.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A run that could begin. `packed`: the training sequences by length; `rows`: the validation sequences that are read each time."""

    config: Config
    device: torch.device
    packed: dict[int, PackedDocuments]
    validation: PackedDocuments
    rows: list[int]
    baselines: Baselines
    fingerprint: str
    model: LanguageModel
    optimizer: Optimizer
    plan: lt.Plan | None
    report: lt.Report | None
    flop_rate: float
    """FLOP/s that the MFU is a share of."""


def prepare(config: Config, where: Locations) -> Setup:
    """Read the data, build the model, stream it as planned. Nothing is written."""
    device = choose_device(config, where)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.train.seed)

    train_documents, validation_documents = read_documents(config)
    check_vocabulary([*train_documents, *validation_documents], config.model.vocab_size)
    packed = {s.seq_len: pack(train_documents, s.seq_len, config.data) for s in config.stages()}
    validation = pack(validation_documents, config.data.seq_len, config.data)
    rows = validation_rows(validation, config.train.validation_tokens)

    model = LanguageModel(config.model).to(device)
    if config.train.init is not None:
        try:
            load_weights(model, Path(config.train.init))
        except ValueError as error:
            raise where.error("train.init", str(error)) from None
    optimizer = Optimizer(model, config.train)
    plan = make_plan(model, config, where)
    rate = config.metrics.peak_tflops
    return Setup(
        config=config,
        device=device,
        packed=packed,
        validation=validation,
        rows=rows,
        baselines=compute_baselines(train_documents, validation, rows, VOCABULARY),
        fingerprint=fingerprint(train_documents, config.data),
        model=model,
        optimizer=optimizer,
        plan=plan,
        report=None if plan is None else lt.apply(model, plan),
        flop_rate=rate * 1e12 if rate else measure_rate(device, getattr(torch, config.train.dtype)),
    )


def choose_device(config: Config, where: Locations) -> torch.device:
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise where.error("train.device", "no GPU is visible to PyTorch; set auto or cpu, or install a CUDA build of torch")
    return torch.device("cuda" if config.train.device != "cpu" and torch.cuda.is_available() else "cpu")


def read_documents(config: Config) -> tuple[list[Document], list[Document]]:
    """Training and validation documents."""
    documents = read_stdlib() if config.data.source == "stdlib" else read_text(config.data.files)
    return split_documents(documents, config.data.validation_fraction, config.data.seed)


def pack(documents: Sequence[Document], seq_len: int, data: DataConfig) -> PackedDocuments:
    return PackedDocuments(
        documents, seq_len, packing=data.packing, min_document_tokens=data.min_document_tokens, seed=data.seed
    )


def validation_rows(validation: PackedDocuments, tokens: int | None) -> list[int]:
    """The sequences that every validation reads: all of them, or the first of a fixed shuffle."""
    count = len(validation) if tokens is None else math.ceil(tokens / validation.seq_len)
    return [int(row) for row in validation.order(0)[:count]]


def make_plan(model: LanguageModel, config: Config, where: Locations) -> lt.Plan | None:
    """The planner's plan for a budget, the hand-made one, or None: nothing is streamed."""
    if config.memory.budget is not None:
        try:
            return lt.plan(model, seq_len=config.data.seq_len, budget=config.memory.budget)
        except lt.InfeasibleBudget as error:
            raise where.error("memory.budget", str(error)) from None
    settings = config.memory.plan_settings()
    return lt.Plan(**settings) if settings else None


def fingerprint(documents: Sequence[Document], data: DataConfig) -> str:
    """Of everything that decides which tokens update number n reads: the documents, their packing, the seed."""
    total = zlib.crc32(f"{data.packing} {data.min_document_tokens} {data.seed}".encode())
    for document in documents:
        total = zlib.crc32(document.tokens.data, zlib.crc32(str(len(document.tokens)).encode(), total))
    return f"{len(documents)} documents, {sum(len(d.tokens) for d in documents)} tokens, {total:08x}"


def describe(setup: Setup) -> None:
    """What is about to happen, before the first step."""
    config, plan, packed = setup.config, setup.plan, setup.packed[setup.config.data.seq_len]
    parameters = sum(p.numel() for p in setup.model.parameters())
    print(f"model   {parameters:,} parameters, {config.model.num_layers} layers, {config.train.dtype}")
    if MISSING is not None:
        print(f"kernels pure torch, slower: {MISSING}")
    print(
        f"data    {config.data.source}: {len(packed.documents)} training documents in {len(packed)} sequences of {packed.seq_len} tokens, "
        f"{len(setup.validation.documents)} held out"
    )
    if plan is None:
        print("memory  not streamed: memory.chunk_tokens or memory.budget would")
    else:
        predicted = f", predicted peak {format_bytes(plan.predicted_peak)}" if plan.predicted_peak else ""
        print(
            f"memory  chunks of {plan.chunk_tokens} tokens, segments of {plan.segment_layers} layers, "
            f"outputs stored {plan.store_outputs}, K/V stored {plan.store_kv}{predicted}"
        )
    rate = "metrics.peak_tflops" if config.metrics.peak_tflops else "a matrix product measured now"
    print(f"mfu     share of {setup.flop_rate / 1e12:.3g} TFLOP/s ({rate}) in {RULE}", flush=True)


def stage_at(config: Config, step: int) -> LengthStage:
    """The stage of update `step` (from 0)."""
    stages = config.stages()
    return stages[bisect_right([s.from_step for s in stages], max(0, step)) - 1]


def set_rotary(model: LanguageModel, stage: LengthStage) -> None:
    """Give every rotary embedding the base and the scaling of a stage."""
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            module.base, module.scaling = stage.rope_base, stage.rope_scaling


def update_batches(config: Config, packed: dict[int, PackedDocuments], step: int) -> list[Batch]:
    """The sequences of update `step` (from 0): a function of the configuration and the step alone."""
    stage = stage_at(config, step)
    sequences = stage.tokens_per_update // stage.seq_len
    first = (step - stage.from_step) * sequences
    return [packed[stage.seq_len].batch(first + i) for i in range(sequences)]


def remaining_tokens(config: Config, step: int) -> int:
    """Tokens of the updates from `step` on."""
    stages = config.stages()
    ends = [s.from_step for s in stages[1:]] + [config.train.steps]
    return sum(max(0, end - max(step, s.from_step)) * s.tokens_per_update for s, end in zip(stages, ends, strict=True))
