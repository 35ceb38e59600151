"""kill -9 a run again and again, start it again each time, and compare it with one that was left alone.

    python tools/kill_resume.py                       # 30 kills over 240 updates, at least 5 of them inside a checkpoint write
    python tools/kill_resume.py --kills 3 --steps 30 --inside 1
    python tools/kill_resume.py --model hf            # a model of transformers; --model lora: its adapters

Every update's loss, gradient norm and learning rate, every validation and the final weights must be equal bit for bit. A kill counts as
inside a write when a half-written checkpoint stands afterwards; the next start must say that it removed it. A write that is to be killed
does not end before, nor does a run, however late this process is. Exit code 0 if all holds.
The runs are forked from this process, which has imported everything and computed nothing: a start takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch._dynamo  # noqa: F401  what a run imports is imported once, before the forks

import longtrain.train.loop  # noqa: F401
from longtrain import cli
from longtrain.train import checkpoint
from longtrain.train.output import read_metrics

MODELS = {
    "own": "{vocab_size: 256, num_layers: 2, hidden_size: 96, intermediate_size: 256, num_heads: 2, num_kv_heads: 1, "
           "attention_dropout: 0.1}",
    "hf": "{hf: SHAPE}",
    "lora": "{hf: SHAPE, quantize: int8, lora: {rank: 4, dropout: 0.1}}",
}
SHAPE = dict(
    model_type="llama", vocab_size=256, num_hidden_layers=2, hidden_size=96, intermediate_size=256, num_attention_heads=2,
    num_key_value_heads=1, head_dim=48, max_position_embeddings=64, attention_dropout=0.1, pad_token_id=None, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
CONFIG = """\
model: {model}
memory: {{chunk_tokens: 24, store_outputs: 0.5}}
data: {{source: text, files: [{texts}], seq_len: 64}}
train: {{steps: {steps}, length_schedule: [{{from_step: 0, seq_len: 32}}, {{from_step: {half}, seq_len: 64, {rope}}}],
  tokens_per_update: 128, dtype: {dtype}, device: cpu, threads: 1, validate_every: 20, validation_tokens: 128}}
checkpoint: {{every_steps: 3, keep: 2}}
metrics: {{peak_tflops: 1.0}}
output: {{dir: {out}}}
"""
STEP = re.compile(r"^step +(\d+)/\d+  T ", re.MULTILINE)
if importlib.util.find_spec("matplotlib"):
    importlib.import_module("matplotlib.backends.backend_agg")
    importlib.import_module("matplotlib.figure")

REMOVED = re.compile(r"removed half-written (\S+)")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--inside", type=int, default=5, help="kills that must hit a checkpoint write")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--model", default="own", choices=MODELS)
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    parser.add_argument("--out", type=Path, help="directory for both runs and the log (a temporary one by default)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        return compare(args, args.out or Path(temporary))


def compare(args: argparse.Namespace, directory: Path) -> int:
    chance = random.Random(args.seed)
    texts = directory / "texts"
    texts.mkdir(parents=True)
    for index in range(20):
        (texts / f"{index:02}.txt").write_text(
            " ".join(chance.choice(["span", "chunk", "carry", "tier"]) for _ in range(chance.randrange(20, 90)))
        )
    shape, theirs = directory / "config.json", args.model != "own"
    if theirs:
        shape.write_text(json.dumps(SHAPE))
        for library in (
            "longtrain.hf",
            "longtrain.train.pretrained",
            "transformers.models.llama.modeling_llama",
            *["peft"] * (args.model == "lora"),
        ):
            importlib.import_module(library)
    model, rope = MODELS[args.model].replace("SHAPE", str(shape)), "rope: {rope_theta: 20000.0}" if theirs else "rope_base: 20000.0"
    configs = {}
    for name in ("alone", "killed"):
        configs[name] = directory / f"{name}.yaml"
        settings = {
            "model": model,
            "rope": rope,
            "texts": texts,
            "steps": args.steps,
            "half": args.steps // 2,
            "dtype": args.dtype,
            "out": directory / name,
        }
        configs[name].write_text(CONFIG.format(**settings))
    began = time.monotonic()
    code = wait(start(configs["alone"], directory / "alone.log"))
    if code != 0:
        print((directory / "alone.log").read_text())
        return 1
    print(f"alone: {args.steps} updates in {time.monotonic() - began:.1f} s", flush=True)

    run, log = directory / "killed", directory / "killed.log"
    log.touch()
    inside = 0
    for kill in range(1, args.kills + 1):
        inside += len(kill_once(configs["killed"], run, log, args, chance, kill))
    code = wait(start(configs["killed"], log))
    text = log.read_text()
    problems = [] if code == 0 else [f"the last start ended with exit code {code}"]
    problems += differences(directory / "alone", run)
    removed = REMOVED.findall(text)
    if len(removed) < inside:
        problems.append(f"{inside} checkpoints were left half written, the log says that {len(removed)} were removed")
    if left := [p.name for p in (run / "checkpoints").glob(".*")]:
        problems.append(f"left behind: {', '.join(left)}")
    if inside < args.inside:
        problems.append(f"only {inside} kills were inside a checkpoint write, {args.inside} are asked for")
    again = sum(r["dropped_steps"][1] - r["dropped_steps"][0] + 1 for r in records(run, "resume") if r.get("dropped_steps"))
    print(f"{args.kills} kills, {inside} inside a checkpoint write, {again} updates done again, {time.monotonic() - began:.0f} s in all")
    for problem in problems:
        print(f"FAILED: {problem}")
    if problems:
        print(text[-4000:])
    else:
        print(f"equal bit for bit: losses, gradient norms and learning rates of {args.steps} updates, validations, weights")
    return 1 if problems else 0


def kill_once(config: Path, run: Path, log: Path, args: argparse.Namespace, chance: random.Random, kill: int) -> list[str]:
    """Start the run and kill it: a fifth of the times while it starts, else a random while after a random update (the moments are spread
    over the run), and of these every other time while a checkpoint is being written. Returns what this start left half written.
    """
    began, starting = len(log.read_text()), kill % 10 in (4, 8)
    target = min(args.steps - 6, round((kill + chance.uniform(-0.5, 0.5)) * args.steps / (args.kills + 1)))
    moment = chance.uniform(0, 0.5 if starting else 0.03)
    inside = not starting and kill % 2 == 1
    process = start(config, log, hold=target if inside else args.steps - 1)

    def done() -> int:
        steps = STEP.findall(log.read_text()[began:])
        return int(steps[-1]) if steps else 0

    def writing() -> bool:
        return bool(half_written(run))

    if not starting:
        alive = wait_until(process, lambda: done() >= max(target, 1)) and (not inside or wait_until(process, writing))
        if not alive:
            raise SystemExit(f"the run ended before kill {kill}\n{log.read_text()[-2000:]}")
    time.sleep(moment)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    reached = done()
    left = half_written(run) if reached else []  # before its first update, what is there is of the start before
    where = f"inside a write: {', '.join(left)} left" if left else "between writes" if reached else "while starting"
    print(f"kill {kill:2}: {f'after step {reached:3}, ' if reached else ''}{where}", flush=True)
    return left


def half_written(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").glob(".step-*") if "removed" not in p.name)


def hold_checkpoints(after: int) -> None:
    """From now on this process finishes no checkpoint of an update beyond `after`."""
    flush = checkpoint._flush_directory

    def held(directory: Path) -> None:
        flush(directory)
        while directory.name.endswith(checkpoint.PARTIAL) and int(re.search(r"\d+", directory.name)[0]) > after:
            time.sleep(1)

    checkpoint._flush_directory = held


def start(config: Path, log: Path, hold: int | None = None) -> int:
    """Fork a `longtrain train`, which finishes no checkpoint beyond update `hold`; returns its process id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            if hold is not None:
                hold_checkpoints(hold)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = cli.main(["train", str(config)])
            sys.stdout.flush()
        finally:
            os._exit(code)
    return process


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_until(process: int, reached: Callable[[], bool]) -> bool:
    """Whether the process still runs when `reached` says so."""
    while not reached():
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    return True


def records(run: Path, kind: str) -> list[dict]:
    path = run / "metrics.jsonl"
    return [r for r in read_metrics(path) if r["kind"] == kind] if path.exists() else []


def differences(alone: Path, killed: Path) -> list[str]:
    found = []
    for kind, names in (("step", ("step", "loss", "grad_norm", "lr", "seq_len")), ("validation", ("step", "loss"))):
        a, b = ([tuple(r[name] for name in names) for r in records(run, kind)] for run in (alone, killed))
        if a != b:
            first = next((f"{x} alone, {y} killed" for x, y in zip(a, b, strict=False) if x != y), f"{len(a)} alone, {len(b)} killed")
            found.append(f"{kind} records differ: {first}")
    final = [path for path in alone.rglob("*.safetensors") if "checkpoints" not in path.parts]
    if not final or any(path.read_bytes() != (killed / path.relative_to(alone)).read_bytes() for path in final):
        found.append("the final weights differ")
    return found


if __name__ == "__main__":
    sys.exit(main())
