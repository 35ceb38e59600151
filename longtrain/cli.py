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
        sub.set_defaults(command=command)
    sub = commands.add_parser("doctor", help="show this machine, which backend serves which op, and run a self-test")
    sub.set_defaults(command=doctor)
    return parser


def train(args: argparse.Namespace) -> int:
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


def doctor(args: argparse.Namespace) -> int:
    from longtrain import doctor

    return doctor.run()


if __name__ == "__main__":
    sys.exit(main())
