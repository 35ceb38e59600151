"""The training loop: read the data, build the model, stream it as planned, update, validate, write.

Everything that can be wrong is checked before the first file is written; a loss that is not finite stops the run before the update.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import torch

import longtrain as lt
from longtrain._extension import MISSING
from longtrain.config import Config, Locations, dump_config
from longtrain.config.schema import DataConfig
from longtrain.data.baselines import compute_baselines
from longtrain.data.packing import Batch, PackedDocuments, check_ids
from longtrain.data.sources import VOCABULARY, Document, check_vocabulary, read_stdlib, read_text, split_documents
from longtrain.nn import LanguageModel, count_targets
from longtrain.train import output
from longtrain.train.console import StepBar, step_line, verdict
from longtrain.train.evaluate import check_probes, evaluate
from longtrain.train.optimizer import Optimizer
from longtrain.train.output import Metrics, RunError, said_plainly, write_whole
from longtrain.train.peak_memory import read_peak, reset_peak
from longtrain.train.plot import plot_run
from longtrain.train.schedule import learning_rate
from longtrain.units import format_bytes, format_time, parse_bytes


def run(config: Config, where: Locations) -> None:
    """Train one model. Raises ConfigError, DataError or RunError, each with one line to show."""
    began = time.monotonic()
    directory = Path(config.output.dir)
    if output.holds_run(directory) and not config.output.overwrite:
        raise where.error("output.dir", f"{directory} already holds a run; name another, or set output.overwrite=true")
    check_probes(config, where)
    device = choose_device(config, where)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.train.seed)

    train_documents, validation_documents = read_documents(config)
    check_vocabulary([*train_documents, *validation_documents], config.model.vocab_size)
    packed = {s.seq_len: pack(train_documents, s.seq_len, config.data) for s in config.stages()}
    validation = pack(validation_documents, config.data.seq_len, config.data)
    rows = validation_rows(validation, config.train.validation_tokens)
    baselines = compute_baselines(train_documents, validation, rows, VOCABULARY)

    model = LanguageModel(config.model).to(device)
    optimizer = Optimizer(model, config.train)
    plan = make_plan(model, config, where)
    bar = StepBar(sys.stdout)
    if plan is not None:
        report = lt.apply(model, plan)
        if bar.shown:
            report.on_progress(bar.span_done)
    budget = parse_bytes(config.memory.budget, "memory.budget") if config.memory.budget else None

    with said_plainly(directory):
        directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / output.CONFIG, lambda path: path.write_text(dump_config(config), encoding="utf-8"))
    metrics = Metrics(directory / output.METRICS)
    metrics.write(
        "run",
        unigram=baselines.unigram,
        bigram=baselines.bigram,
        budget_bytes=budget,
        plan=dataclasses.asdict(plan) if plan else None,
        longtrain=lt.__version__,
        torch=torch.__version__,
        device=str(device),
        threads=torch.get_num_threads(),
    )
    describe(config, plan, model, len(train_documents), len(validation_documents), packed[config.data.seq_len])

    for step in range(config.train.steps):
        started = time.monotonic()
        reset_peak(device)
        batches = update_batches(config, packed, step)
        seq_len, tokens = batches[0].input_ids_BT.shape[1], sum(b.input_ids_BT.numel() for b in batches)
        bar.begin(f"step {step + 1}/{config.train.steps}", seq_len, len(batches))
        loss, targets = accumulate(model, optimizer, batches, step + 1, device, bar)
        norm = optimizer.grad_norm()
        grad_norm = float(norm)
        if not math.isfinite(grad_norm):
            raise not_finite("gradient norm", grad_norm, step + 1, batches)
        lr = learning_rate(config.train, step)
        optimizer.update(lr, norm)
        seconds = time.monotonic() - started
        bar.clear()
        measured = {"seq_len": seq_len, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens_per_second": tokens / seconds}
        measured["peak_bytes"] = read_peak(device)
        eta = seconds / tokens * remaining_tokens(config, step + 1)
        print(step_line(step + 1, config.train.steps, **measured, budget_bytes=budget, eta_seconds=eta), flush=True)
        metrics.write("step", step=step + 1, **measured, tokens=tokens, targets=targets, seconds=seconds)

        last = step + 1 == config.train.steps
        if last or (config.train.validate_every and (step + 1) % config.train.validate_every == 0):
            evaluation = evaluate(model, config, validation, rows, device, bar)
            print(f"step {step + 1}/{config.train.steps}  {evaluation}", flush=True)
            metrics.write("validation", step=step + 1, **evaluation.record())
        if last or (config.train.save_every and (step + 1) % config.train.save_every == 0):
            write_whole(directory / output.WEIGHTS, model.save_safetensors)

    seconds = time.monotonic() - began
    metrics.write(
        "result",
        validation_loss=evaluation.loss,
        bits_per_byte=evaluation.loss / math.log(2),
        **dataclasses.asdict(baselines),
        seconds=seconds,
    )
    metrics.close()
    written = [output.WEIGHTS, output.METRICS, output.CONFIG]
    try:
        plot_run(directory / output.METRICS, directory / output.PLOT)
        written.append(output.PLOT)
    except ImportError:
        print("no plot: matplotlib is not installed; get it with: pip install longtrain[plot]")
    print(evaluation.table())
    print(verdict(evaluation.loss, evaluation.targets, baselines))
    print(f"{format_time(seconds)} in all; {directory} holds {', '.join(written)}")


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


def describe(config: Config, plan: lt.Plan | None, model: LanguageModel, train: int, validation: int, packed: PackedDocuments) -> None:
    """What is about to happen, before the first step."""
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model   {parameters:,} parameters, {config.model.num_layers} layers, {config.train.dtype}")
    if MISSING is not None:
        print(f"kernels pure torch, slower: {MISSING}")
    print(
        f"data    {config.data.source}: {train} training documents in {len(packed)} sequences of {packed.seq_len} tokens, "
        f"{validation} held out"
    )
    if plan is None:
        print("memory  not streamed: memory.chunk_tokens or memory.budget would")
    else:
        predicted = f", predicted peak {format_bytes(plan.predicted_peak)}" if plan.predicted_peak else ""
        print(
            f"memory  chunks of {plan.chunk_tokens} tokens, segments of {plan.segment_layers} layers, "
            f"outputs stored {plan.store_outputs}, K/V stored {plan.store_kv}{predicted}",
            flush=True,
        )


def update_batches(config: Config, packed: dict[int, PackedDocuments], step: int) -> list[Batch]:
    """The sequences of update `step` (from 0): a function of the configuration and the step alone."""
    stages = config.stages()
    stage = stages[bisect_right([s.from_step for s in stages], step) - 1]
    sequences = stage.tokens_per_update // stage.seq_len
    first = (step - stage.from_step) * sequences
    return [packed[stage.seq_len].batch(first + i) for i in range(sequences)]


def remaining_tokens(config: Config, step: int) -> int:
    """Tokens of the updates from `step` on."""
    stages = config.stages()
    ends = [s.from_step for s in stages[1:]] + [config.train.steps]
    return sum(max(0, end - max(step, s.from_step)) * s.tokens_per_update for s, end in zip(stages, ends, strict=True))


def accumulate(
    model: LanguageModel, optimizer: Optimizer, batches: Sequence[Batch], step: int, device: torch.device, bar: StepBar
) -> tuple[float, int]:
    """Gradients of one update and its loss: every sequence's sum over the targets of all of them. Also their number."""
    model.train()
    targets = sum(count_targets(b.labels_BT, b.cu_seqlens) for b in batches)
    loss = 0.0
    for batch in batches:
        check_ids(batch, model.config.vocab_size)
        on_device = batch.to(device)
        part = model(
            on_device.input_ids_BT, labels=on_device.labels_BT, cu_seqlens=on_device.cu_seqlens, normalizer=targets
        ).loss
        value = float(part.detach())
        if not math.isfinite(value):
            raise not_finite("loss", value, step, [batch])
        part.backward()
        optimizer.collect()
        loss += value
        bar.sequence_done()
    return loss, targets


def not_finite(what: str, value: float, step: int, batches: Sequence[Batch]) -> RunError:
    names = [name for batch in batches for name in batch.documents]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return RunError(
        f"step {step}: the {what} is {value}, on {shown}; stopped before the update, and weights saved before are untouched; "
        "lower train.lr, raise train.warmup_steps, or look at these documents"
    )
