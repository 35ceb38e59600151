"""The `longtrain` command: reads its arguments and hands over. Exit codes: 0 well, 1 the work failed, 2 the request is wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from longtrain.config import ConfigError
    from longtrain.data.sources import DataError
    from longtrain.train.output import RunError

    try:
        return args.command(args)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (DataError, RunError) as error:
        print(f"longtrain: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("longtrain: interrupted; what was saved before stands", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="longtrain", description="Exact, memory-bounded training on long sequences.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, help_text in (
        ("train", train, "train a model as a YAML file says"),
        ("verify", verify, "check streamed gradients against plain autograd on a config's model"),
        ("plan", plan, "show what fits a config's memory budget and what it costs"),
    ):
        sub = commands.add_parser(name, help=help_text, description=help_text)
        sub.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml")
        sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file")
        if name == "train":
            sub.add_argument("--eval", action="store_true", help="evaluate the weights instead; CONFIG may be a run's directory")
        sub.set_defaults(command=command)
    sub = commands.add_parser("report", help="make one HTML page of what a run did")
    sub.add_argument("run", metavar="RUN", help="directory of the run, such as out/quickstart")
    sub.add_argument("--out", metavar="FILE", help="where to write the page (report.html in the run's directory)")
    sub.set_defaults(command=report)
    config = commands.add_parser("config", help="explain the settings").add_subparsers(required=True, metavar="COMMAND")
    sub = config.add_parser("explain", help="type, default, meaning and example of a setting, or of all in a section")
    sub.add_argument("key", nargs="?", default="", metavar="KEY", help="such as train.lr, or train.length_schedule.seq_len, or train")
    sub.set_defaults(command=explain)
    sub = commands.add_parser("doctor", help="show this machine, which backend serves which op, and run a self-test")
    sub.set_defaults(command=doctor)
    return parser


def train(args: argparse.Namespace) -> int:
    if args.eval:
        from longtrain.train import evaluate_run

        return evaluate_run.run(args.config, args.overrides)
    from longtrain.config import load_config
    from longtrain.train import run

    run(*load_config(args.config, args.overrides))
    return 0


def verify(args: argparse.Namespace) -> int:
    from longtrain import verify

    return verify.run(args.config, args.overrides)


def plan(args: argparse.Namespace) -> int:
    from longtrain.planner import command

    return command.run(args.config, args.overrides)


def report(args: argparse.Namespace) -> int:
    from longtrain import report

    return report.run(args.run, args.out)


def explain(args: argparse.Namespace) -> int:
    from longtrain.config import explain

    return explain.run(args.key)


def doctor(args: argparse.Namespace) -> int:
    from longtrain import doctor

    return doctor.run()


if __name__ == "__main__":
    sys.exit(main())
