"""Evaluation: the loss on held-out documents, by position and by source, and probes of what the model finds far back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import nn

from longtrain.config import Config, Locations
from longtrain.config.schema import EvalConfig
from longtrain.data.packing import PackedDocuments, check_ids
from longtrain.errors import RunError
from longtrain.span import IGNORE_INDEX, Layout
from longtrain.train.calls import row_loss, vocabulary
from longtrain.train.console import StepBar
from longtrain.train.distribute import Work
from longtrain.train.probes import ASKED, SHORTEST, ProbeResult, check_distance, run_probe

TEXT_TOKENS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one evaluation found; `asdict` of it is its metrics record."""

    loss: float
    targets: int
    positions: list[dict]
    """``{"start", "stop", "loss", "error", "targets"}`` a bucket: its targets are predicted at positions ``[start, stop)`` of their own
    document; `error` is the standard error of the mean, targets taken as independent."""
    sources: list[dict] = field(default_factory=list)
    """``{"source", "loss", "error", "targets"}`` for each source of documents, where there are several."""
    probes: list[ProbeResult] = field(default_factory=list)

    def record(self) -> dict:
        """As the metrics file holds it: plain values, and no part that is empty."""
        return {key: value for key, value in asdict(self).items() if value != []}

    def __str__(self) -> str:
        """One line."""
        probes = "".join(f"  {p.probe} {p.distance:,} back {p.accuracy:.0%} (chance {p.chance:.1%})" for p in self.probes)
        return f"validation loss {self.loss:.4f} over {self.targets:,} targets{probes}"

    def table(self) -> str:
        """Loss by position and the probes, a line each."""
        lines = ["position in the document    loss  +-        targets"]
        lines += [f"{p['start']:>10,} to {p['stop'] - 1:>10,}  {_means(p)}" for p in self.positions]
        if self.sources:
            lines.append("source")
            lines += [f"{p['source'][:24]:<24}  {_means(p)}" for p in self.sources]
        if self.probes:
            lines.append("probe     tokens back  right  chance  answers")
            lines += [f"{p.probe:<8}  {p.distance:>11,}  {p.accuracy:>5.1%}  {p.chance:>6.1%}  {p.answers:>7,}" for p in self.probes]
        return "\n".join(lines)


def _means(part: dict) -> str:
    return f"{part['loss']:.4f}  {part['error']:.4f}  {part['targets']:>12,}"


def evaluate(
    model: nn.Module, config: Config, validation: PackedDocuments, rows: Sequence[int], device: torch.device, bar: StepBar,
    work: Work = Work(),
) -> Evaluation:
    """Loss and probes, as the config says; of several processes, each has the same."""
    found = validate(model, validation, rows, device, bar, config.eval, work)
    return replace(found, probes=run_probes(model, config, validation, device, work))


def run_probes(
    model: nn.Module, config: Config, validation: PackedDocuments, device: torch.device, work: Work = Work()
) -> list[ProbeResult]:
    """Every probe at every distance. Needles hide in validation text; the tokens in use are those of that text. Processes that keep parts
    of the parameters ask the same at the same time."""
    if not config.eval.probes:
        return []
    text = validation_text(validation)
    asked = {
        "longest": validation.seq_len,
        "alphabet": np.unique(text),
        "text": text,
        "seed": config.data.seed,
        "device": device,
        "join": work.join,
    }
    return [
        run_probe(model, name, distance, examples=config.eval.examples, **asked)
        for name in config.eval.probes
        for distance in probe_distances(config, name)
    ]


def validation_text(validation: PackedDocuments) -> np.ndarray:
    """The tokens of the first validation sequences, without padding: 65,536 or one sequence, or all there are."""
    parts: list[np.ndarray] = []
    for row in range(len(validation)):
        batch = validation.read_row(row)
        parts.append(batch.input_ids_BT[batch.labels_BT != IGNORE_INDEX].numpy())
        if sum(map(len, parts)) >= TEXT_TOKENS:
            break
    return np.concatenate(parts)


def probe_distances(config: Config, name: str) -> tuple[int, ...]:
    """Those of the config; else a sixteenth, a quarter, half and nearly all of the sequence, even, where the probe fits."""
    shortest, longest = SHORTEST[name], config.data.seq_len
    farthest = (longest - ASKED[name]) // 2 * 2
    usual = {max(longest // part // 2 * 2, shortest) for part in (16, 4, 2)} | {farthest}
    return config.eval.distances or tuple(sorted(d for d in usual if shortest <= d <= farthest))


def check_probes(config: Config, where: Locations) -> None:
    """Raise ConfigError for a distance at which a probe of the config cannot ask."""
    for name in config.eval.probes:
        if not probe_distances(config, name):
            raise where.error("eval.probes", f"{name} needs longer sequences than data.seq_len ({config.data.seq_len}); remove it")
        for index, distance in enumerate(config.eval.distances):
            try:
                check_distance(name, distance, config.data.seq_len)
            except ValueError as error:
                raise where.error(f"eval.distances[{index}]", str(error)) from None


def position_edges(first: int, tokens: int) -> list[int]:
    """Bucket edges ``0, first, 2 first, 4 first, ... tokens``: each bucket holds as much context again as all before it."""
    edges = [0, min(first, tokens)]
    while edges[-1] < tokens:
        edges.append(min(2 * edges[-1], tokens))
    return edges


@torch.no_grad()
def validate(
    model: nn.Module,
    validation: PackedDocuments,
    rows: Sequence[int],
    device: torch.device,
    bar: StepBar,
    settings: EvalConfig = EvalConfig(),
    work: Work = Work(),
) -> Evaluation:
    """The loss over `rows`, documents isolated; a target's position is that of the token before it in its document (or piece of one)."""
    model.eval()
    mine, held = work.of_sequences(rows), work.held(validation.seq_len)
    runs = -(-len(rows) // work.data)  # the same number of passes on all processes, for they gather parameters together
    bar.begin("validation", -validation.seq_len, runs)
    edges = position_edges(settings.first_bucket, validation.seq_len)
    by_position = _Sums(len(edges) - 1)
    by_source: dict[str, _Sums] = {}
    for run in range(runs):
        batch = validation.read_row(mine[run] if run < len(mine) else rows[0], held)
        check_ids(batch, vocabulary(model))
        layout = Layout(validation.seq_len, Layout.make(validation.seq_len, batch.cu_seqlens).edges, held)
        losses_BT = row_loss(model, batch.to(device), reduction="none")
        if run >= len(mine):
            continue
        scored_T = (layout.take(layout.next_token_targets(batch.labels_BT))[0] != IGNORE_INDEX).numpy()
        bucket_T = np.searchsorted(edges, layout.positions().numpy(), side="right") - 1
        loss_T = losses_BT[0].double().cpu().numpy()
        by_position.add(bucket_T[scored_T], loss_T[scored_T])
        names = sorted(set(batch.sources))
        named = np.array([*(names.index(source) for source in batch.sources), -1])  # padding, if any, comes last
        source_T = named[layout.document_ids().numpy().clip(0, len(batch.sources))]
        for number, source in enumerate(names):
            part_T = loss_T[scored_T & (source_T == number)]
            by_source.setdefault(source, _Sums(1)).add(np.zeros(len(part_T), dtype=np.int64), part_T)
        bar.sequence_done()
        work.processes.moved()
    bar.clear()
    (by_position, by_source), *others = work.processes.gather((by_position, by_source))
    for of_positions, of_sources in others:
        by_position.merge(of_positions)
        for source, sums in of_sources.items():
            by_source.setdefault(source, _Sums(1)).merge(sums)
    if not by_position.targets.sum():
        raise RunError(
            f"none of the {len(rows) * validation.seq_len:,} validation tokens is a target (they are prompts only); raise "
            "train.validation_tokens, or set data.packing: best_fit, which leaves such pieces out"
        )
    sources = [{"source": name, **sums.parts()[0]} for name, sums in sorted(by_source.items()) if sums.targets[0]]
    return Evaluation(
        loss=float(by_position.loss.sum() / by_position.targets.sum()),
        targets=int(by_position.targets.sum()),
        positions=[
            {"start": a, "stop": b, **part}
            for a, b, part in zip(edges[:-1], edges[1:], by_position.parts(), strict=True)
            if part["targets"]
        ],
        sources=sources if len(sources) > 1 else [],
    )


class _Sums:
    """Numbers of targets in each bucket, and their losses summed: plain and squared."""

    def __init__(self, buckets: int) -> None:
        self.targets, self.loss, self.square = np.zeros(buckets, dtype=np.int64), np.zeros(buckets), np.zeros(buckets)

    def add(self, bucket_N: np.ndarray, loss_N: np.ndarray) -> None:
        for sums, weights in ((self.targets, None), (self.loss, loss_N), (self.square, loss_N**2)):
            sums += np.bincount(bucket_N, weights, minlength=len(sums))

    def merge(self, other: _Sums) -> None:
        for sums, more in ((self.targets, other.targets), (self.loss, other.loss), (self.square, other.square)):
            sums += more

    def parts(self) -> list[dict]:
        """Mean, standard error and number of each bucket."""
        n = np.maximum(self.targets, 1)
        mean = self.loss / n
        error = np.sqrt(np.maximum(self.square / n - mean**2, 0) / n)
        return [
            {"loss": m, "error": e, "targets": t} for m, e, t in zip(mean.tolist(), error.tolist(), self.targets.tolist(), strict=True)
        ]
