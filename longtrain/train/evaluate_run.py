"""`longtrain train --eval RUN_OR_CONFIG`: evaluate the weights of a run on its validation documents, without training."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import longtrain as lt
from longtrain.config import load_config
from longtrain.data.sources import check_vocabulary
from longtrain.nn import LanguageModel
from longtrain.train import loop, output
from longtrain.train.console import StepBar
from longtrain.train.evaluate import check_probes, evaluate
from longtrain.train.output import RunError, write_whole

EVALUATION = "evaluation.json"


def run(run_or_config: str, overrides: Sequence[str]) -> int:
    """Print the evaluation and write it beside the weights as `evaluation.json`, where the report finds it.

    A run is a directory with `config.yaml` and `model.safetensors`; a config stands for its `output.dir`. Overrides may ask other probes
    or another length. Raises ConfigError, DataError, or RunError where the weights are missing or of another shape.
    """
    given = Path(run_or_config)
    config, where = load_config(given / output.CONFIG if given.is_dir() else given, overrides)
    directory = given if given.is_dir() else Path(config.output.dir)
    weights = directory / output.WEIGHTS
    if not weights.exists():
        raise RunError(f"{directory} holds no {output.WEIGHTS}, so there is nothing to evaluate; train first, or name the run's directory")
    check_probes(config, where)
    device = loop.choose_device(config, where)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    _, documents = loop.read_documents(config)
    check_vocabulary(documents, config.model.vocab_size)
    validation = loop.pack(documents, config.data.seq_len, config.data)

    model = LanguageModel(config.model).to(device, torch.bfloat16 if config.train.dtype == "bfloat16" else torch.float32)
    try:
        model.load_safetensors(weights)
    except ValueError as error:
        raise RunError(str(error)) from None
    plan = loop.make_plan(model, config, where)
    bar = StepBar(sys.stdout)
    if plan is not None:
        report = lt.apply(model, plan)
        if bar.shown:
            report.on_progress(bar.span_done)
    found = evaluate(model, config, validation, loop.validation_rows(validation, config.train.validation_tokens), device, bar)
    print(found)
    print(found.table())
    record = {"kind": "evaluation", "overrides": list(overrides), **found.record()}
    write_whole(directory / EVALUATION, lambda path: path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8"))
    print(f"written to {directory / EVALUATION}")
    return 0
