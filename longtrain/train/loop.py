"""The training loop: update, validate, save, until the last update or until asked to stop.

Everything that can be wrong is checked before the first file is written (`prepare.py`); where the run begins is for `resume.py` to find.
What an update reads and computes is a function of the configuration, the checkpoint and its number alone: a run that was killed and
started again has the losses, bit for bit, of one that was not.

Several processes run the same loop, each on its share (`distribute.py`); what one decides by a clock, a signal or what is on disk, they
agree on. The first one writes.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

import longtrain as lt
from longtrain.config import Config, Locations, dump_config
from longtrain.data.corpus import BYTES
from longtrain.data.packing import Batch
from longtrain.errors import RunError
from longtrain.files import write_whole
from longtrain.train import output
from longtrain.train.checkpoint import one_process, path_of, read_facts
from longtrain.train.console import StepBar, step_line, verdict
from longtrain.train.distribute import make_work
from longtrain.train.evaluate import Evaluation, check_probes, evaluate
from longtrain.train.flops import RULE, update_flops
from longtrain.train.lock import locked
from longtrain.train.metrics import Metrics, check_extras, open_sinks, rewind
from longtrain.train.peak_memory import read_peak, reset_peak
from longtrain.train.plot import plot_run
from longtrain.train.prepare import Setup, describe, prepare, save_model
from longtrain.train.processes import ALONE, Processes
from longtrain.train.provenance import provenance
from longtrain.train.resume import begins_anew, changed_settings, check_facts, find_checkpoint, flat
from longtrain.train.saving import Saved, Saver
from longtrain.train.schedule import learning_rate, remaining_tokens, stage_at
from longtrain.train.spike import MOST_IN_A_ROW, SpikeGuard
from longtrain.train.state import describe_tensors, random_states, restore_state, state_tensors
from longtrain.train.step import NotFinite, gradients
from longtrain.train.stop import Stop, Stopped
from longtrain.units import format_time, parse_bytes, parse_time

LIMIT, LEAST_LIMIT = 20, 120.0
"""A step of several processes ends the run when it gets no span ahead for so many times its FLOPs' time, and for so many seconds."""


def run(config: Config, where: Locations, stop_after: float | None = None, processes: Processes = ALONE) -> int:
    """Train one model; `stop_after` seconds from now at the latest, save and end. Every one of `processes` calls it.

    Returns the command's exit code: 0, or what `Stopped` says. Raises ConfigError, DataError or RunError, each with one line to show.
    """
    began = time.monotonic()
    directory = Path(config.output.dir)
    same = {"torch": torch.__version__, "longtrain": lt.__version__, "--stop-after": stop_after, **dict(flat(dataclasses.asdict(config)))}
    processes.check_same(same, "start all of them with the same config and the same software")
    work = make_work(config, where, processes)
    processes.first(lambda: begins_anew(config, where))
    check_extras(config, where)
    check_probes(config, where)
    setup = prepare(config, where, work)
    lock = locked(directory) if processes.rank == 0 else nullcontext()
    stop = Stop(began + stop_after if stop_after else None, processes.greatest, f"rank {processes.rank}: " if processes.size > 1 else "")
    with lock, stop, one_process():
        trainer = Trainer(setup, where, stop, began)
        trainer.begin()
        try:
            trainer.train()
            trainer.conclude()
        except Stopped as stopped:
            trainer.end_early(stopped)
            return stopped.exit_code
        finally:
            trainer.close()
    return 0


class Trainer:
    """A run that holds its directory: `done` updates of it, and the random states after the last of them."""

    def __init__(self, setup: Setup, where: Locations, stop: Stop, began: float) -> None:
        self.setup, self.config, self.where, self.stop, self.began = setup, setup.config, where, stop, began
        self.work, self.processes = setup.work, setup.work.processes
        self.directory = Path(self.config.output.dir)
        self.bar = StepBar(sys.stdout)
        self.guard = SpikeGuard(self.config.spike)
        self.done = self.validated = 0
        self.seconds_before = 0.0
        self.limit = self.time_limit(0.0)
        self.slowest: dict[int, float] = {}
        self.saved: Saved | None = None
        self.evaluation: Evaluation | None = None
        self.metrics: Metrics | None = None
        self.budget = parse_bytes(self.config.memory.budget, "memory.budget") if self.config.memory.budget else None

    def begin(self) -> None:
        """Find where to go on from, put the run into that state, open the metrics."""
        describe(self.setup)
        anew = self.processes.first(lambda: begins_anew(self.config, self.where))
        checkpoint, notes = self.processes.first(lambda: find_checkpoint(self.config, self.where, anew))
        say("resume", notes)
        resumed = {"notes": notes}
        if checkpoint is not None:
            resumed |= self.restore(checkpoint)
        self.random = random_states()
        self.saver = Saver(self.directory / output.CHECKPOINTS, self.config.checkpoint, self.processes, self.bar.clear)
        self.saver.check_room_ahead(state_tensors(self.setup.model, self.setup.optimizer))
        self.open_metrics(resumed, append=not anew)
        self.validated = self.processes.first(lambda: self.validated)  # as the metrics say, which the first process has
        if self.setup.report is not None:
            self.setup.report.on_progress(self.span_done)

    def restore(self, checkpoint: Path) -> dict:
        """Go back to the state in `checkpoint`; returns what the metrics should hold of it."""
        facts = read_facts(checkpoint)
        check_facts(facts, self.setup.loader.fingerprint, self.setup.frozen, checkpoint, self.config, self.where)
        try:
            restore_state(checkpoint, self.setup.model, self.setup.optimizer, self.processes.group)
        except ValueError as error:
            raise self.where.error("model", f"{error}; give the model section that it had, or begin anew elsewhere") from None
        self.guard.restore(facts["guard"])
        self.done, self.seconds_before = facts["step"], facts["seconds"]
        changed = changed_settings(checkpoint, self.config)
        say("resume", [f"going on from step {self.done}, {checkpoint}", *(f"changed since then: {change}" for change in changed)])
        return {"step": self.done, "checkpoint": str(checkpoint), "changed": changed}

    def open_metrics(self, resumed: dict, append: bool) -> None:
        """Write the config; go on with the metrics up to `done`, or begin them; record what runs where. The first process does."""
        config, setup, path = self.config, self.setup, self.directory / output.METRICS
        self.config_text = dump_config(config)
        if self.processes.rank:
            self.metrics = Metrics([])
            return
        goes_on = self.done > 0 and append and path.exists()
        if goes_on:
            kept, dropped = rewind(path, self.done)
            self.validated = max((r["step"] for r in kept if r["kind"] == "validation"), default=0)
            resumed |= dropped
            if dropped["dropped_steps"]:
                say("resume", ["updates {} to {} are done again, their metrics were dropped".format(*dropped["dropped_steps"])])
        if self.done < config.train.steps:
            (self.directory / output.EVALUATION).unlink(missing_ok=True)  # of weights that are about to change
        write_whole(self.directory / output.CONFIG, lambda path: path.write_text(self.config_text, encoding="utf-8"))
        self.metrics = Metrics(open_sinks(config, self.directory, self.done, append=goes_on))
        environment = {
            "budget_bytes": self.budget,
            "plan": dataclasses.asdict(setup.plan) if setup.plan else None,
            "device": str(setup.device),
            "threads": torch.get_num_threads(),
            "processes": self.processes.size,
            "config": dataclasses.asdict(config),
            "mfu_rule": RULE,
            "flop_rate": setup.flop_rate,
            **provenance(),
        }
        if not goes_on:
            counted = {"unigram": setup.baselines.unigram, "bigram": setup.baselines.bigram} if setup.baselines else {}
            self.metrics.write("run", **counted, **environment)
        if self.done > 0:
            self.metrics.write("resume", **resumed, **environment)

    def span_done(self, phase: str, done: int, total: int) -> None:
        """Between two spans of the streaming engine: a long step can be given up, and the state before it saved."""
        if self.processes.size == 1 or done == total:  # at the same places in all processes
            self.stop.check()
        self.processes.moved()
        self.bar.span_done(phase, done, total)

    def train(self) -> None:
        """Until the last update is done, validated and saved. Raises Stopped."""
        config = self.config
        while True:
            last = self.done == config.train.steps
            every = config.train.validate_every
            if (last and self.evaluation is None) or (self.done > self.validated and every and self.done % every == 0):
                self.validate()
            self.note_saved(self.saver.collect())
            if self.processes.greatest([self.saver.due(self.done, last)])[0]:
                self.save()
            if last:
                self.note_saved(self.saver.finish())
                return
            self.stop.check(ahead=self.seconds_ahead())
            self.update()

    def update(self) -> None:
        """The next update, or, where its loss is a spike, what the guard says."""
        config, setup, model, optimizer = self.config, self.setup, self.setup.model, self.setup.optimizer
        started, step = time.monotonic(), self.done + 1
        reset_peak(setup.device)
        setup.set_rotary(stage_at(config, self.done))
        batches = setup.loader.update(self.done)
        tokens, flops = self.work.total_of_groups(sum(b.input_ids_BT.numel() for b in batches), update_flops(setup.costs, batches))
        seq_len, tokens = batches[0].input_ids_BT.shape[1], int(tokens)
        self.limit = self.time_limit(flops)
        self.processes.doing(f"step {step}", self.limit)
        self.bar.begin(f"step {step}/{config.train.steps}", seq_len, len(batches))
        try:
            loss, targets, norm = gradients(
                model, optimizer, batches, step, setup.device, self.bar, work=self.work, seed=config.train.seed
            )
            spike = self.guard.spike(loss, seq_len)
        except NotFinite as error:  # never saved: the weights may be what is wrong
            spike = self.guard.spike(math.nan, seq_len) and str(error)
            if spike is None or not self.guard.skips():
                raise
        self.bar.clear()
        if spike is not None:
            self.leave_out(spike, batches)
        else:
            lr = learning_rate(config.train, self.done)
            optimizer.update(lr, norm)
            seconds = time.monotonic() - started
            self.slowest[seq_len] = max(seconds, self.slowest.get(seq_len, 0.0))
            measured = {"seq_len": seq_len, "loss": loss, "grad_norm": float(norm), "lr": lr, "tokens_per_second": tokens / seconds}
            measured["mfu"] = flops / seconds / setup.flop_rate
            measured["peak_bytes"] = read_peak(setup.device)
            eta = seconds / tokens * remaining_tokens(config, step)
            print(step_line(step, config.train.steps, **measured, budget_bytes=self.budget, eta_seconds=eta), flush=True)
            self.metrics.write("step", step=step, **measured, tokens=tokens, targets=targets, seconds=seconds)
        self.done, self.random = step, random_states()
        self.processes.doing(f"after step {step}")

    def time_limit(self, flops: float) -> float:
        """Seconds in which a step of several processes must get one span ahead."""
        given = self.config.parallel.step_timeout
        return parse_time(given) if given else max(LEAST_LIMIT, flops / self.setup.flop_rate * LIMIT)

    def leave_out(self, spike: str, batches: Sequence[Batch]) -> None:
        """Forget the gradients of a spike. Raises RunError, with the state before it saved, unless spikes are skipped."""
        self.setup.optimizer.discard()
        skipped, step = self.guard.skips(), self.done + 1
        self.metrics.write("spike", step=step, found=spike, skipped=skipped, documents=[name for b in batches for name in b.documents])
        print(f"step {step}/{self.config.train.steps}  spike, {'skipped' if skipped else 'not skipped'}: {spike}", flush=True)
        if not skipped:
            if self.done > self.saver.last_step:
                self.save()
            self.note_saved(self.saver.finish())
            raise RunError(
                f"step {step}: spike: {spike}; stopped before the update, as spike.action says or after {MOST_IN_A_ROW} in a row, with "
                f"step {self.done} saved; lower train.lr, look at the documents in {output.METRICS}, or set spike.action"
            )

    def validate(self) -> None:
        setup = self.setup
        setup.set_rotary(stage_at(self.config, self.done - 1))
        self.processes.doing(f"the validation after step {self.done}", self.limit)
        self.evaluation = evaluate(setup.model, self.config, setup.validation, setup.rows, setup.device, self.bar, self.work)
        self.random = random_states()
        if self.done > self.validated:
            print(f"step {self.done}/{self.config.train.steps}  {self.evaluation}", flush=True)
            self.metrics.write("validation", step=self.done, **self.evaluation.record())
            self.validated = self.done

    def save(self) -> None:
        """Begin a checkpoint of the state after `done` updates. The metrics up to there are on disk before it."""
        tensors = {**state_tensors(self.setup.model, self.setup.optimizer), **self.random}
        facts = {
            "step": self.done,
            "seconds": self.seconds(),
            "data": self.setup.loader.fingerprint,
            "frozen": self.setup.frozen,
            "guard": self.guard.state(),
            "plan": dataclasses.asdict(self.setup.plan) if self.setup.plan else None,
            "tensors": describe_tensors(tensors),
        }
        self.metrics.flush()
        self.note_saved(self.saver.save(self.done, tensors, facts, self.config_text))

    def note_saved(self, saved: Saved | None) -> None:
        if saved is not None:
            self.saved = saved
            self.metrics.write("checkpoint", **dataclasses.asdict(saved))

    def seconds(self) -> float:
        """What the run has taken, with what it took before it was interrupted."""
        return self.seconds_before + time.monotonic() - self.began

    def seconds_ahead(self) -> float:
        """What the next update and a checkpoint will take, as far as is known."""
        return self.slowest.get(stage_at(self.config, self.done).seq_len, 0.0) + (self.saved.seconds if self.saved else 0.0)

    def end_early(self, stopped: Stopped) -> None:
        """Save what is done, and say how to go on."""
        self.bar.clear()
        self.processes.doing(f"saving step {self.done}")
        if self.done > self.saver.last_step:
            self.save()
        self.note_saved(self.saver.finish())
        self.metrics.write("stopped", step=self.done, reason=str(stopped))
        saved = ", saved" if self.done else ""
        given = "" if self.config.checkpoint.resume == "auto" else " with checkpoint.resume=auto"
        goes_on = f"the same command{given} goes on from there"
        print(f"stopped ({stopped}) after step {self.done}/{self.config.train.steps}{saved}; {goes_on}", flush=True)

    def conclude(self) -> None:
        """Weights, result, picture, verdict. The first process makes them: the weights of several are those of the last checkpoint."""
        setup, directory, evaluation = self.setup, self.directory, self.evaluation
        if self.processes.rank:
            return
        of_bytes = setup.loader.corpus.tokenizer == BYTES
        weights = save_model(setup, self.where, directory, path_of(directory / output.CHECKPOINTS, self.done))
        self.metrics.write(
            "result",
            step=self.done,
            validation_loss=evaluation.loss,
            **({"bits_per_byte": evaluation.loss / math.log(2)} if of_bytes else {}),
            **(dataclasses.asdict(setup.baselines) if setup.baselines else {}),
            seconds=self.seconds(),
        )
        written = [weights, output.METRICS, output.CONFIG, output.CHECKPOINTS]
        try:
            plot_run(directory / output.METRICS, directory / output.PLOT)
            written.append(output.PLOT)
        except ImportError:
            print("no plot: matplotlib is not installed; get it with: pip install longtrain[plot]")
        print(evaluation.table())
        print(verdict(evaluation.loss, evaluation.targets, setup.baselines, "byte" if of_bytes else "token"))
        print(f"{format_time(self.seconds())} in all; {directory} holds {', '.join(written)}")

    def close(self) -> None:
        """Let a checkpoint that is being written come to its end, and the metrics; stop reading ahead."""
        self.setup.loader.close()
        try:
            self.saver.finish()
        finally:
            self.metrics.close()


def say(what: str, lines: Sequence[str]) -> None:
    for line in lines:
        print(f"{what:<8}{line}", flush=True)
