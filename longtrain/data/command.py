"""`longtrain data build` and `longtrain data info`: their arguments."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longtrain.data.build import Settings, build
from longtrain.data.info import info

LEFT_OUT = 3
"""Exit code of a build that is whole but for what could not be read."""


def run_build(args: argparse.Namespace) -> int:
    settings = Settings(
        format=args.format,
        field=args.field,
        case=args.case,
        tokenizer=args.tokenizer and Path(args.tokenizer),
        special_tokens=args.special_tokens,
        end_token=args.end_token,
        turns=args.turns,
        shard_bytes=args.shard_size,
    )
    return LEFT_OUT if build(Path(args.out), args.inputs, settings, sys.stderr) else 0


def run_info(args: argparse.Namespace) -> int:
    return info([Path(path) for path in args.paths], args.seq_len, args.check)
