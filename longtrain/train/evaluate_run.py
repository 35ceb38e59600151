"""`longtrain train --eval RUN_OR_CONFIG`: evaluate the weights of a run on its validation documents, without training."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import longtrain as lt
from longtrain.config import load_config
from longtrain.data.loader import open_data, pack, validation_rows
from longtrain.nn import LanguageModel
from longtrain.train import checkpoint as on_disk
from longtrain.train import output
from longtrain.train.console import StepBar
from longtrain.train.evaluate import check_probes, evaluate
from longtrain.train.output import EVALUATION, RunError, write_whole
from longtrain.train.prepare import choose_device, make_plan, set_rotary, stage_at
from longtrain.train.weights import load_weights


def run(run_or_config: str, overrides: Sequence[str]) -> int:
    """Print the evaluation and write it into the run's directory as `evaluation.json`, where the report finds it.

    A run is a directory with `config.yaml`; a config stands for its `output.dir`. Its weights are those of the end, or of the newest
    whole checkpoint. Overrides may ask other probes, or read more. Raises ConfigError, DataError, or RunError without weights that fit.
    """
    given = Path(run_or_config)
    config, where = load_config(given / output.CONFIG if given.is_dir() else given, overrides)
    directory = given if given.is_dir() else Path(config.output.dir)
    check_probes(config, where)
    device = choose_device(config, where)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    validation = pack(open_data(config.data)[1], config.data.seq_len, config.data)

    model = LanguageModel(config.model).to(device, getattr(torch, config.train.dtype))
    print(f"weights {read_weights(model, directory)}")
    set_rotary(model, stage_at(config, config.train.steps))
    plan = make_plan(model, config, where)
    bar = StepBar(sys.stdout)
    if plan is not None:
        report = lt.apply(model, plan)
        if bar.shown:
            report.on_progress(bar.span_done)
    rows = validation_rows(validation, config.train.validation_tokens)
    found = evaluate(model, config, validation, rows, device, bar)
    print(f"{found}\n{found.table()}")
    record = {"kind": "evaluation", "overrides": list(overrides), **found.record()}
    write_whole(directory / EVALUATION, lambda path: path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8"))
    print(f"written to {directory / EVALUATION}")
    return 0


def read_weights(model: LanguageModel, directory: Path) -> Path:
    """Fill `model` from a run's final weights, or its newest whole checkpoint; returns which. Raises RunError."""
    path: Path | None = directory / output.WEIGHTS
    try:
        if path.exists():
            load_weights(model, path)
            return path
        checkpoints = directory / output.CHECKPOINTS
        path, _ = on_disk.newest_whole(checkpoints) if checkpoints.is_dir() else (None, {})
        if path is None:
            raise RunError(f"{directory} holds neither {output.WEIGHTS} nor a whole checkpoint: train first, or name the run's directory")
        load_checkpoint_weights(model, path)
    except ValueError as error:
        raise RunError(str(error)) from None
    return path


def load_checkpoint_weights(model: LanguageModel, checkpoint: Path) -> None:
    """Fill `model` with the float32 weights of a checkpoint. Raises ValueError where their names or shapes are others."""
    shapes = on_disk.read_facts(checkpoint)["tensors"]
    stored = {n.removeprefix(p): n for p in ("weights.", "model.") for n in shapes if n.startswith(p)}
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in sorted(own.keys() | stored.keys()):
        theirs = shapes[stored[name]] if name in stored else "nothing"
        ours = list(own[name].shape) if name in own else "nothing"
        if theirs != ours:
            raise ValueError(f"{checkpoint} has {theirs} for {name}, where the model section makes {ours}; make it describe these weights")
    held = {key: torch.empty(shapes[key]) for key in stored.values()}
    with on_disk.one_process():
        on_disk.read_tensors(checkpoint, held)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(held[stored[name]])
