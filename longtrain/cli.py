"""The `longtrain` command: reads its arguments and hands over.

Exit codes: 0 well, 1 the work failed, 2 the request is wrong; 75 a run that ended at --stop-after, 128 + n one that ended on signal n
(both saved: the same command goes on).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longtrain.train.processes import Processes


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(one.startswith("-") for one in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # settings behind an option, which argparse takes for strangers
        args.overrides = [*args.overrides, *rest]
    try:
        status = args.command(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # the reader went away, as in `| head`: what is still buffered has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        raise
    except (Exception, KeyboardInterrupt) as error:
        if (said := explain_error(error)) is None:
            raise
        print(said[0], file=sys.stderr)
        return said[1]


def explain_error(error: BaseException) -> tuple[str, int] | None:
    """What to say of an error, and the exit code; None of one that nobody expected."""
    from longtrain.config import ConfigError
    from longtrain.data.sources import DataError
    from longtrain.errors import RunError

    if isinstance(error, ConfigError):
        return str(error), 2
    if isinstance(error, (DataError, RunError)):
        return f"longtrain: {error}", 1
    if isinstance(error, KeyboardInterrupt):
        return "longtrain: interrupted; what was saved before stands", 130
    from longtrain.memory.profile import out_of_memory

    if out_of_memory(error):
        said = str(error).partition("\n")[0] or type(error).__name__
        advice = "`longtrain profile CONFIG` shows what takes it, `longtrain plan CONFIG` what would fit"
        return f"longtrain: out of memory ({said}); {advice}", 1
    return None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="longtrain", description="Exact, memory-bounded training on long sequences.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, help_text in (
        ("train", train, "train a model as a YAML file says"),
        ("verify", verify, "check streamed gradients against plain autograd on a config's model"),
    ):
        sub = commands.add_parser(name, help=help_text, description=help_text)
        sub.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml")
        sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file")
        if name == "verify":
            sub.add_argument(
                "--nproc", type=int, default=1, metavar="P", help="check P processes that share sequences and weights against one"
            )
        if name == "train":
            sub.add_argument("--eval", action="store_true", help="evaluate the weights instead; CONFIG may be a run's directory")
            sub.add_argument(
                "--stop-after", metavar="TIME", type=seconds, help="save and end before so much time, such as 11h50m; exit code 75"
            )
        sub.set_defaults(command=command)
    about = "show what fits a memory budget, how long a step takes, and what would have to change"
    sub = commands.add_parser("plan", help=about, description=about)
    sub.add_argument("config", metavar="CONFIG|MODEL", help="YAML file, a shape such as llama3-8b, or a config.json of transformers")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file")
    sub.add_argument("--seq-len", type=int, metavar="T", help="tokens of a sequence (the config's)")
    sub.add_argument("--budget", metavar="SIZE", help="memory of each device, such as 72GiB (the config's, or 95%% of the device)")
    sub.add_argument(
        "--device", metavar="NAME", help="a100, h100, h200, b200, rtx4090 ..., or a file of longtrain calibrate (this machine)"
    )
    sub.add_argument("--gpus", type=int, metavar="N", help="devices (1)")
    sub.add_argument("--host", metavar="SIZE", help="host memory that may be used, of all devices together (the config's, or none)")
    sub.add_argument("--disk", metavar="SIZE", help="disk that may be used, likewise")
    sub.add_argument("--batch", type=int, nargs="+", default=[1], metavar="B", help="sequences of a micro-batch to try (1, as train runs)")
    sub.add_argument("--out", metavar="DIR", help="write plan.yaml, plan.html and plan.png there")
    sub.add_argument("--quick", action="store_true", help="leave out the Pareto front and the longest sequence")
    sub.set_defaults(command=plan)
    about = "measure what a step's time is made of on this machine, for longtrain plan"
    sub = commands.add_parser("calibrate", help=about, description=about)
    sub.add_argument("--out", metavar="FILE", default="machine.json", help="profile to write (machine.json)")
    sub.add_argument("--path", metavar="DIR", default=".", help="directory on the disk that is to be a tier (.)")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), help="of products and attention (bfloat16 on a GPU, float32 on a CPU)")
    sub.set_defaults(command=calibrate)
    sub = commands.add_parser("profile", help="show what a config's step holds in memory, predicted and measured")
    sub.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file")
    sub.add_argument("--out", metavar="DIR", help="directory to write (memory in the run's)")
    sub.add_argument("--sampling", action="store_true", help="under 5%% of the step's time instead of under 30%%; no operations and lines")
    sub.add_argument(
        "--seq-len", nargs="+", type=int, default=[], metavar="T", help="measure these lengths too, for the chart of peak against length"
    )
    sub.set_defaults(command=profile)
    sub = commands.add_parser("compare", help="show two memory profiles on one axis, and what the difference is made of")
    sub.add_argument("a", metavar="A", help="directory that lt.profile or longtrain profile has written")
    sub.add_argument("b", metavar="B", help="another one")
    sub.add_argument("--out", metavar="FILE", help="where to write the page (comparison.html in B)")
    sub.set_defaults(command=compare)
    sub = commands.add_parser("report", help="make one HTML page of what a run did")
    sub.add_argument("run", metavar="RUN", help="directory of the run, such as out/quickstart")
    sub.add_argument("--out", metavar="FILE", help="where to write the page (report.html in the run's directory)")
    sub.set_defaults(command=report)
    sub = commands.add_parser("task", help="train a small classifier on a task made on the spot, with and without squashed filters")
    sub.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/tasks/listops.yaml")
    sub.add_argument("overrides", nargs="*", metavar="setting=value", help="settings that replace those of the file")
    sub.set_defaults(command=task)
    sub = commands.add_parser("export", help="write a run's weights as a Hugging Face directory of sharded safetensors")
    sub.add_argument("run", metavar="RUN", help="directory of the run, or one of its checkpoints")
    sub.add_argument("out", metavar="OUT", help="directory to write, empty or not there")
    sub.add_argument("--dtype", choices=("trained", "float32", "bfloat16", "float16"), default="trained", help="the run's, by default")
    sub.add_argument("--shard", type=memory, default="5GB", metavar="SIZE", help="bytes of a file at most (5GB)")
    sub.set_defaults(command=export)
    config = commands.add_parser("config", help="explain the settings").add_subparsers(required=True, metavar="COMMAND")
    sub = config.add_parser("explain", help="type, default, meaning and example of a setting, or of all in a section")
    sub.add_argument("key", nargs="?", default="", metavar="KEY", help="such as train.lr, or train.length_schedule.seq_len, or train")
    sub.set_defaults(command=explain)
    data = commands.add_parser("data", help="tokens on disk, for runs that read more than fits in memory")
    data = data.add_subparsers(required=True, metavar="COMMAND")
    sub = data.add_parser("build", help="make them from text, JSONL, parquet, FASTA or WAV; run it again to go on after an interruption")
    sub.add_argument("out", metavar="OUT", help="directory to write")
    sub.add_argument("inputs", nargs="+", metavar="INPUT", help="file, directory or glob pattern")
    formats = ("auto", "text", "bytes", "jsonl", "parquet", "fasta", "wav", "chat")
    sub.add_argument("--format", choices=formats, default="auto", help="of the inputs; auto: what their names say, text otherwise")
    sub.add_argument("--field", default="text", metavar="NAME", help="field (JSONL) or column (parquet) that holds the text (text)")
    sub.add_argument("--case", choices=("keep", "upper", "lower"), default="keep", help="of FASTA letters (keep)")
    sub.add_argument(
        "--turns", choices=("all", "last"), default="all", help="with --format chat: learn from these turns of the assistant (all)"
    )
    sub.add_argument("--tokenizer", metavar="FILE", help="a local tokenizer.json, or its directory; bytes are the tokens by default")
    sub.add_argument("--special-tokens", action="store_true", help="with --tokenizer: let it add its special tokens to every document")
    sub.add_argument("--end-token", type=int, metavar="ID", help="put this token behind every document")
    sub.add_argument("--shard-size", type=memory, default="256MiB", metavar="SIZE", help="tokens of a file, in bytes (256MiB)")
    sub.set_defaults(command=data_build)
    sub = data.add_parser("info", help="lengths of the documents, where they come from, what each packing wastes")
    sub.add_argument("paths", nargs="+", metavar="PATH", help="directory that `longtrain data build` has written")
    sub.add_argument("--seq-len", nargs="+", type=int, default=[], metavar="T", help="show what packing into such sequences wastes")
    sub.add_argument("--check", action="store_true", help="read everything and compare the checksums")
    sub.set_defaults(command=data_info)
    sub = commands.add_parser("doctor", help="show this machine, which backend serves which op, and run a self-test")
    sub.set_defaults(command=doctor)
    return parser


def train(args: argparse.Namespace) -> int:
    from longtrain.config import ConfigError, load_config
    from longtrain.train import evaluate_run, run
    from longtrain.train.processes import join

    if args.eval and args.stop_after is not None:
        raise ConfigError("command line", "--stop-after", "ends training, and --eval trains nothing; leave one of them out")
    with join(explain_error) as processes:
        if args.eval:
            status = evaluate_run.run(args.config, args.overrides, processes)
        else:
            status = run(*load_config(args.config, args.overrides), stop_after=args.stop_after, processes=processes)
    return ended(status, processes)


def ended(status: int, processes: Processes) -> int:
    if processes.size > 1:  # the interpreter's own end races with threads of gloo's that are still there
        sys.stdout.flush()
        os._exit(status)
    return status


def task(args: argparse.Namespace) -> int:
    from longtrain.tasks import run

    return run.run(args.config, args.overrides)


def export(args: argparse.Namespace) -> int:
    from longtrain.train import export

    return export.run(args.run, args.out, args.dtype, args.shard)


def verify(args: argparse.Namespace) -> int:
    if args.nproc != 1:
        from longtrain.commands import verify_processes

        return verify_processes.run(args.config, args.overrides, args.nproc)
    from longtrain.commands import verify

    return verify.run(args.config, args.overrides)


def plan(args: argparse.Namespace) -> int:
    from longtrain.commands import plan

    return plan.run(args)


def calibrate(args: argparse.Namespace) -> int:
    from longtrain.planner import calibrate

    return calibrate.run(args.out, args.path, args.dtype)


def profile(args: argparse.Namespace) -> int:
    from longtrain.commands import profile
    from longtrain.train.processes import join

    with join(explain_error) as processes:
        status = profile.run(
            args.config, args.overrides, out=args.out, sampling=args.sampling, lengths=args.seq_len, processes=processes
        )
    return ended(status, processes)


def compare(args: argparse.Namespace) -> int:
    from longtrain.memory import compare

    return compare.run(args.a, args.b, args.out)


def report(args: argparse.Namespace) -> int:
    from longtrain import report

    return report.run(args.run, args.out)


def explain(args: argparse.Namespace) -> int:
    from longtrain.config import explain

    return explain.run(args.key)


def data_build(args: argparse.Namespace) -> int:
    from longtrain.data import command

    return command.run_build(args)


def data_info(args: argparse.Namespace) -> int:
    from longtrain.data import command

    return command.run_info(args)


def doctor(args: argparse.Namespace) -> int:
    from longtrain import doctor

    return doctor.run()


def memory(text: str) -> int:
    from longtrain.units import parse_bytes

    try:
        return parse_bytes(text, "SIZE")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def seconds(text: str) -> float:
    from longtrain.units import parse_time

    try:
        return parse_time(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
