"""What a run needs before its first update, made from its configuration: device, data, model, plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import longtrain as lt
from longtrain._extension import MISSING
from longtrain.config import Config, Locations
from longtrain.config.hf import HfModelConfig
from longtrain.config.memory import MemoryConfig
from longtrain.config.schema import LengthStage
from longtrain.data.baselines import Baselines, compute_baselines
from longtrain.data.corpus import Corpus, check_vocabulary
from longtrain.data.packing import PackedDocuments
from longtrain.files import write_whole
from longtrain.nn.attention import Attention
from longtrain.planner.pretrained import layers_differ
from longtrain.train import output
from longtrain.train.budget import make_plan
from longtrain.train.calls import described, is_transformers, vocabulary
from longtrain.train.distribute import Work, choose_device, sequence_group, shard
from longtrain.train.flops import RULE, Costs, costs_of, measure_rate
from longtrain.train.loader import Loader, fingerprint, open_data, pack, validation_rows
from longtrain.train.model import build_model
from longtrain.train.optimizer import Optimizer
from longtrain.train.state import frozen_sum, load_checkpoint_weights, sum_of
from longtrain.train.watch import SILENT
from longtrain.train.weights import cast, load_weights
from longtrain.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A run that could begin. `rows`: the validation sequences that are read each time."""

    config: Config
    device: torch.device
    loader: Loader
    validation: PackedDocuments
    rows: list[int]
    baselines: Baselines | None
    model: nn.Module
    """longtrain's own, or one of transformers."""
    set_rotary: Callable[[LengthStage], None]
    """Gives the model the rotary positions of a stage."""
    notes: tuple[str, ...]
    optimizer: Optimizer
    plan: lt.Plan | None
    report: lt.Report | None
    costs: Costs
    flop_rate: float
    """FLOP/s of all devices together, that the MFU is a share of."""
    frozen: int
    """A checksum of the weights that are not trained."""
    work: Work
    """What of it this process does."""


def prepare(config: Config, where: Locations, work: Work = Work()) -> Setup:
    """Read the data, build the model, stream it as planned. Nothing is written.

    Several processes each make all of it on the CPU, compare what they have, and then keep their parts.
    """
    device = choose_device(config, where, work.processes)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.train.seed)

    documents, held_out = open_data(config.data)
    if isinstance(config.model, HfModelConfig):
        from longtrain.train.pretrained import check_tokenizer, locate

        locate(config.model.hf, where)
        check_tokenizer(config.model.hf, documents.tokenizer, where)  # before weights are read, which may take minutes
    model, set_rotary, notes = build_model(config, where)
    for corpus in (documents, held_out):
        check_vocabulary(corpus, vocabulary(model))
        if isinstance(config.model, HfModelConfig):
            check_fits(model, corpus, config, where)
    validation = pack(held_out, config.data.seq_len, config.data)
    rows = validation_rows(validation, config.train.validation_tokens)

    settle_fallback(model, device, config, where)
    if config.train.init is not None:
        try:
            load_weights(model, Path(config.train.init))
        except ValueError as error:
            raise where.error("train.init", str(error)) from None
    frozen, costs = frozen_sum(model, getattr(torch, config.train.dtype)), costs_of(model)
    if work.mesh is None:
        model.to(device)
    else:
        said = {"data": fingerprint(documents, config.data), "held out": fingerprint(held_out, config.data)}
        said |= {"the sum of the weights": sum_of(model.parameters()), "the first random number": torch.random.initial_seed()}
        work.processes.check_same(said, "give all of them the same files")
        plan = share_weights(model, config, where, work)
    optimizer = Optimizer(model, config.train, on_host=config.memory.optimizer == "host")
    if work.mesh is None:
        plan = make_plan(model, config, where)
    report = None if plan is None else stream(model, plan, where, work, [stage.seq_len for stage in config.stages()])
    work = replace(work, sharing=None if report is None else report.sharing)
    return Setup(
        config=config,
        device=device,
        loader=Loader(config.stages(), config.data, documents, config.train.steps, mine=work.of_sequences, held=work.held),
        validation=validation,
        rows=rows,
        baselines=compute_baselines(documents, validation, rows, documents.vocabulary) if work.processes.rank == 0 else None,
        model=model,
        set_rotary=set_rotary,
        notes=notes,
        optimizer=optimizer,
        plan=plan,
        costs=costs,
        report=report,
        flop_rate=work.processes.size * work.processes.first(lambda: rate_of(config, device)),
        frozen=frozen,
        work=work,
    )


def share_weights(model: nn.Module, config: Config, where: Locations, work: Work) -> lt.Plan | None:
    """Have each of several processes keep its part of the parameters; returns the plan, which is made before."""
    if config.memory.optimizer == "host":
        raise where.error(
            "memory.optimizer", "host is for one process; sharded over several, the optimizer takes a share on each device: set device"
        )
    plan = make_plan(model, config, where, work)
    work.processes.check_same({"the plan": plan}, "give all of them the same memory and the same config")
    shard(model, work, plan.segment_layers if plan else 1, getattr(torch, config.train.dtype))
    return plan


def rate_of(config: Config, device: torch.device) -> float:
    """FLOP/s of one device: the config's, or as measured now."""
    given = config.metrics.peak_tflops
    return given * 1e12 if given else measure_rate(device, getattr(torch, config.train.dtype))


def check_fits(model: nn.Module, corpus: Corpus, config: Config, where: Locations) -> None:
    """Raise ConfigError for documents longer than a transformers model was trained for, unless the config says how positions go on."""
    text = model.config.get_text_config()
    rotary, limit = getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)
    longest = min(config.data.seq_len, int(corpus.length_N.max(initial=0))) if rotary and config.data.isolate else config.data.seq_len
    if limit is None or longest <= limit or config.stages()[-1].rope is not None:
        return
    if rotary:
        raise where.error(
            "model.rope",
            f"is missing: sequences have documents of {longest} tokens, and the model was trained for {limit} positions; say how they go "
            "on, such as rope: {rope_type: yarn, factor: 4} or rope: {rope_theta: 8000000}, or rope: {} to train on with positions as they "
            "are",
        )
    raise where.error("data.seq_len", f"{config.data.seq_len} is more than the {limit} positions that the model has; lower it to {limit}")


def settle_fallback(model: nn.Module, device: torch.device, config: Config, where: Locations) -> None:
    """Refuse a CPU run without kernels unless `train.kernel_fallback` allows it; on a GPU each attention call decides by it."""
    if is_transformers(model) and config.memory == MemoryConfig():
        return  # its own attention runs
    if config.train.kernel_fallback == "error" and device.type == "cpu" and MISSING is not None:
        raise where.error("train.kernel_fallback", f"{MISSING}; or set warn, to run on torch alone, several times slower")
    for module in model.modules():
        if isinstance(module, Attention) or is_transformers(model):
            module.kernel_fallback = config.train.kernel_fallback


def stream(model: nn.Module, plan: lt.Plan, where: Locations, work: Work = Work(), lengths: Sequence[int] = ()) -> lt.Report:
    """Put the plan on the model; a tier that cannot be had, or a way to share sequences of `lengths` that cannot be, is the configuration's
    error."""
    if plan.segment_layers > 1 and layers_differ(model):
        why = "the model's layers are of several kinds and are not given the same, so they cannot share a segment; set 1"
        raise where.error("memory.segment_layers", why)
    try:
        if plan.offload is not None and plan.offload.disk is not None:
            lt.offload.check_disk(plan.offload.disk)
        if work.context == 1:
            report = lt.apply(model, plan)
        else:
            report = lt.apply(model, plan, group=sequence_group(work), parallel=work.spread)
            for tokens in lengths:
                report.sharing.explain(tokens)
    except ValueError as error:
        said = str(error).replace("parallel.heads", "parallel.cp_ulysses")
        raise where.explain(ValueError(said), "memory" if work.context == 1 else "parallel") from None
    if left := next((entry for entry in report.entries if entry.why), None):
        report.undo()
        raise where.error("memory", f"{left.name} cannot be streamed: {left.why}; train the model without the section memory")
    return report


def save_model(setup: Setup, where: Locations, directory: Path, checkpoint: Path) -> str:
    """Write the model as it is at the run's end; the name of the file or directory in `directory`. A transformers model streams no more.

    One that is kept in parts is made once more, with the weights of its last `checkpoint`.
    """
    model, config = setup.model, setup.config
    if setup.work.mesh is not None:
        torch.manual_seed(config.train.seed)  # frozen weights may be drawn with it
        model, set_rotary, _ = build_model(config, where)
        cast(model, getattr(torch, config.train.dtype))
        load_checkpoint_weights(model, checkpoint)
        set_rotary(config.stages()[-1])
    if not isinstance(config.model, HfModelConfig):
        write_whole(directory / output.WEIGHTS, model.save_safetensors)
        return output.WEIGHTS
    from longtrain.train import pretrained

    if setup.report is not None:
        setup.report.undo()  # it changed settings of the model's configuration, which is saved too
    pretrained.save(model, config, directory / output.MODEL)
    return f"{output.MODEL}/"


def describe(setup: Setup) -> None:
    """What is about to happen, before the first step."""
    config, plan, loader, work = setup.config, setup.plan, setup.loader, setup.work
    print(f"model   {described(setup.model)}, {config.train.dtype}")
    for note in setup.notes:
        print(f"        {note}")
    if MISSING is not None:
        print(f"kernels pure torch, slower: {MISSING}")
    packed = loader.mixtures[config.data.seq_len]
    print(
        f"data    {config.data.source}: {len(loader.corpus)} training documents in {len(packed)} sequences of {config.data.seq_len} tokens "
        f"({packed.padding:.0%} padding; the longest document has {packed.longest} in one), {len(setup.validation.corpus)} held out"
    )
    if plan is None:
        print("memory  not streamed: memory.chunk_tokens or memory.budget would")
    else:
        predicted = f", predicted peak {format_bytes(plan.predicted_peak)}" if plan.predicted_peak else ""
        print(
            f"memory  chunks of {plan.chunk_tokens} tokens, segments of {plan.segment_layers} layers, "
            f"outputs stored {plan.store_outputs}, K/V stored {plan.store_kv}{predicted}"
        )
    if work.processes.size > 1:
        print(
            f"ranks   {work.processes.size}: {work.data} groups read other sequences, {work.context} ranks share each; one that gives no "
            f"sign of life for {SILENT:.0f} s ends the run"
        )
    if work.sharing is not None:
        for line in work.sharing.explain(config.data.seq_len).splitlines():
            print(f"        {line}")
    rate = "metrics.peak_tflops" if config.metrics.peak_tflops else "a matrix product measured now"
    print(f"mfu     share of {setup.flop_rate / 1e12:.3g} TFLOP/s ({rate}) in {RULE}", flush=True)
