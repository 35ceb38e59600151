"""`longtrain task CONFIG`: the same model with each filter setting, from each seed; a table, `metrics.jsonl`, a plot with chance in it."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from longtrain.config.nodes import ConfigError
from longtrain.config.run import TrainConfig
from longtrain.errors import RunError
from longtrain.files import said_plainly, write_whole
from longtrain.nn import parameter_groups
from longtrain.tasks.config import TaskConfig, load_task_config
from longtrain.tasks.data import Examples, Task, make_task
from longtrain.tasks.model import SequenceClassifier
from longtrain.train.output import METRICS, read_metrics
from longtrain.train.schedule import learning_rate

PLOT = "accuracy.png"
MEASURED_AT_ONCE = 256
LEARNED_FROM = 500
"""Training examples, at most, whose accuracy is measured too."""


def run(config_path: str, overrides: Sequence[str]) -> int:
    """Train all of them, print and write what they came to; exit code 0."""
    config = load_task_config(config_path, overrides)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    validation = config.measure_on == "validation"
    try:
        counts = config.train_examples, config.test_examples
        task = make_task(config.task, config.tokens, *counts, seed=0, noise=config.noise, validation=validation)
    except ImportError as error:
        raise RunError(str(error)) from error
    except ValueError as error:
        raise ConfigError(config_path, "task", str(error)) from None
    metrics = Path(config.out) / METRICS
    with said_plainly(metrics):
        metrics.parent.mkdir(parents=True, exist_ok=True)
        file = metrics.open("w")
    with file:

        def record(**values) -> None:
            file.write(json.dumps(values) + "\n")
            file.flush()

        record(kind="task", chance=task.chance, **asdict(config))
        print(f"{task.name}: {len(task.train.labels)} examples of up to {config.tokens + config.noise} tokens, chance {task.chance:.1%}")
        for seed in config.seeds:
            for squash in config.squash:
                started = time.process_time()
                for measured in train(task, config, squash, seed):
                    record(kind="measurement", squash=squash, seed=seed, **measured)
                print(
                    f"seed {seed}, squash {squash:<7g} {measured['accuracy']:6.1%} of the {config.measure_on} examples, "
                    f"{measured['train_accuracy']:6.1%} of those learned from; {time.process_time() - started:.0f} s of processor time",
                    flush=True,
                )
    print(summary(read_metrics(metrics)))
    try:
        plot(metrics, Path(config.out) / PLOT)
    except ImportError:
        print("no plot: that needs matplotlib, pip install longtrain[plot]")
    return 0


def train(task: Task, config: TaskConfig, squash: float, seed: int) -> Iterator[dict[str, float]]:
    """One model; after every `measure_every` updates and at the end: step, loss, accuracy on the test and on some training examples."""
    torch.manual_seed(seed)
    model = SequenceClassifier(
        task.vocab_size, task.classes, config.width, config.layers, config.tokens + config.noise,
        center=config.center, dropout=config.dropout, squash=squash, smooth=config.smooth, init=config.init, init_std=config.init_std,
    )  # fmt: skip
    groups = parameter_groups(model, lr=config.lr, weight_decay=config.weight_decay, filter_lr=config.filter_lr)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    falling = TrainConfig(steps=config.steps, lr=1.0, warmup_steps=config.steps // 20, min_lr_ratio=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(falling, step))
    batches = _batches(task.train, config.batch, np.random.default_rng(seed))
    seen, losses = Examples(task.train.ids[:LEARNED_FROM], task.train.labels[:LEARNED_FROM]), []
    for step in range(1, config.steps + 1):
        ids, labels = next(batches)
        loss = F.cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % config.measure_every == 0 or step == config.steps:
            yield {
                "step": step,
                "loss": statistics.fmean(losses),
                "accuracy": accuracy(model, task.test),
                "train_accuracy": accuracy(model, seen),
            }
            losses.clear()


def _batches(examples: Examples, size: int, random: np.random.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    while True:
        order = random.permutation(len(examples.labels))
        for at in range(0, len(order) - size + 1, size):
            chosen = order[at : at + size]
            yield torch.from_numpy(examples.ids[chosen].astype(np.int64)), torch.from_numpy(examples.labels[chosen])


@torch.no_grad()
def accuracy(model: nn.Module, examples: Examples) -> float:
    """Share of the examples that get their label."""
    model.eval()
    right = 0
    for at in range(0, len(examples.labels), MEASURED_AT_ONCE):
        part = slice(at, at + MEASURED_AT_ONCE)
        logits = model(torch.from_numpy(examples.ids[part].astype(np.int64)))
        right += int((logits.argmax(-1).numpy() == examples.labels[part]).sum())
    model.train()
    return right / len(examples.labels)


def final(records: Sequence[dict], squash: float) -> list[float]:
    """The accuracies at the end, one a seed."""
    last = {r["seed"]: r["accuracy"] for r in records if r["kind"] == "measurement" and r["squash"] == squash}
    return list(last.values())


def summary(records: Sequence[dict]) -> str:
    """Mean accuracy of every filter setting, and by how much the first one is above the others, seed by seed, and above chance."""
    head, *_ = records
    first, *others = head["squash"]
    seeds, finals = len(head["seeds"]), {squash: final(records, squash) for squash in head["squash"]}
    lines = [f"squash {squash:<7g} {statistics.fmean(values):6.1%} over {seeds} seeds" for squash, values in finals.items()]
    for other in others:
        less = [100 * (a - b) for a, b in zip(finals[first], finals[other], strict=True)]
        error = f" (standard error {statistics.stdev(less) / seeds**0.5:.1f})" if seeds > 1 else ""
        better = f"better from {sum(points > 0 for points in less)} of {seeds} seeds"
        lines.append(f"squash {first:g} less squash {other:g}: {statistics.fmean(less):+.1f} points{error}, {better}")
    chance = f"chance ({head['chance']:.1%}): {100 * (statistics.fmean(finals[first]) - head['chance']):+.1f} points"
    return "\n".join([*lines, f"squash {first:g} less {chance}"])


def plot(metrics: Path, picture: Path) -> None:
    """Draw accuracy over updates: mean and range over the seeds of every setting, and chance. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    head, *records = read_metrics(metrics)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for squash, color in zip(head["squash"], ("tab:blue", "tab:orange", "tab:green", "tab:red") * len(head["squash"]), strict=False):
        runs = [r for r in records if r["squash"] == squash]
        steps = sorted({r["step"] for r in runs})
        by_step = [[r["accuracy"] for r in runs if r["step"] == step] for step in steps]
        axes.plot(steps, [statistics.fmean(v) for v in by_step], color=color, label=f"squash {squash:g}" if squash else "no squash")
        axes.fill_between(steps, [min(v) for v in by_step], [max(v) for v in by_step], color=color, alpha=0.2, linewidth=0)
    axes.axhline(head["chance"], color="gray", linestyle="--", linewidth=1, label=f"chance, {head['chance']:.1%}")
    title = f"{head['task']}, {head['tokens'] + head['noise']} tokens, {len(head['seeds'])} seeds"
    axes.set(xlabel="update", ylabel=f"{head['measure_on']} accuracy", title=title)
    axes.legend()
    FigureCanvasAgg(figure)
    write_whole(picture, lambda path: figure.savefig(path, format="png", dpi=120))
