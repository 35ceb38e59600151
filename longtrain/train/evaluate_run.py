"""`longtrain train --eval RUN_OR_CONFIG`: evaluate the weights of a run on its validation documents, without training.

Several processes share it as they share training; how many trained the run does not matter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from longtrain.config import load_config
from longtrain.config.hf import HfModelConfig
from longtrain.errors import RunError
from longtrain.files import write_whole
from longtrain.train import checkpoint as on_disk
from longtrain.train import output
from longtrain.train.budget import make_plan
from longtrain.train.console import StepBar
from longtrain.train.distribute import choose_device, make_work
from longtrain.train.evaluate import check_probes, evaluate
from longtrain.train.loader import fingerprint, open_data, pack, validation_rows
from longtrain.train.model import build_model
from longtrain.train.output import EVALUATION
from longtrain.train.prepare import settle_fallback, share_weights, stream
from longtrain.train.processes import ALONE, Processes
from longtrain.train.resume import flat
from longtrain.train.schedule import stage_at
from longtrain.train.state import load_checkpoint_weights, sum_of
from longtrain.train.weights import cast, load_weights


def run(run_or_config: str, overrides: Sequence[str], processes: Processes = ALONE) -> int:
    """Print the evaluation and write it into the run's directory as `evaluation.json`, where the report finds it.

    A run is a directory with `config.yaml`; a config stands for its `output.dir`. Its weights are those of the end, or of the newest
    whole checkpoint. Overrides may ask other probes, or read more. Raises ConfigError, DataError, or RunError without weights that fit.
    """
    given = Path(run_or_config)
    if not given.exists() or given.is_dir() and not (given / output.CONFIG).is_file():
        found = f"{given} holds no {output.CONFIG}" if given.is_dir() else f"there is no {given} (from {Path.cwd()})"
        raise RunError(f"{found}; name the directory of a run, or its YAML file")
    config, where = load_config(given / output.CONFIG if given.is_dir() else given, overrides)
    directory = given if given.is_dir() else Path(config.output.dir)
    processes.check_same(dict(flat(asdict(config))), "start all of them with the same config")
    work = make_work(config, where, processes)
    check_probes(config, where)
    device = choose_device(config, where, processes)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    held_out = open_data(config.data)[1]
    validation = pack(held_out, config.data.seq_len, config.data)

    torch.manual_seed(config.train.seed)  # frozen weights may be drawn with it
    model, set_rotary, _ = build_model(config, where)
    settle_fallback(model, device, config, where)
    cast(model, getattr(torch, config.train.dtype))
    weights = read_weights(model, directory, is_hf=isinstance(config.model, HfModelConfig))
    print(f"weights {weights}")
    if work.mesh is None:
        model.to(device)
        plan = make_plan(model, config, where)
    else:
        said = {"the held out data": fingerprint(held_out, config.data), "the sum of the weights": sum_of(model.parameters())}
        processes.check_same(said, "give all of them the same files")
        plan = share_weights(model, config, where, work)
    done = on_disk.read_facts(weights)["step"] if weights.is_dir() else config.train.steps
    set_rotary(stage_at(config, done - 1))  # as the run's own validation after as many updates
    bar = StepBar(sys.stdout)
    if plan is not None:
        report = stream(model, plan, where, work, [config.data.seq_len])
        work = replace(work, sharing=report.sharing)
        report.on_progress(lambda *progress: (processes.moved(), bar.span_done(*progress)))
    rows = validation_rows(validation, config.train.validation_tokens)
    processes.doing("the evaluation")
    found = evaluate(model, config, validation, rows, device, bar, work)
    print(f"{found}\n{found.table()}")
    if processes.rank == 0:
        record = {"kind": "evaluation", "overrides": list(overrides), **found.record()}
        write_whole(directory / EVALUATION, lambda path: path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8"))
        print(f"written to {directory / EVALUATION}")
    return 0


def read_weights(model: nn.Module, directory: Path, *, is_hf: bool) -> Path:
    """Fill `model` from a run's final weights (of transformers' models always from a checkpoint), or its newest whole checkpoint; returns
    which. Raises RunError."""
    path: Path | None = directory / output.WEIGHTS
    try:
        if not is_hf and path.exists():
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
