"""Entry point of `fastrl`: parses the subcommand and turns a user's mistake into one line on stderr.

Exit codes: 0 success, 1 a failed check or an unexpected error (then with its traceback), 2 a user's mistake, 130
interrupted.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from fastrl.cli import bench, doctor, eval, plot, sample, train, vllm_serve
from fastrl.cli.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fastrl <command> ...` and return the exit code. `argv` defaults to the process's arguments."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    if rest and not arguments.takes_overrides:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = rest
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"fastrl {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if arguments.debug:
            traceback.print_exc()
        print(f"\nfastrl {arguments.command}: interrupted{arguments.interrupted}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrl", description="Reinforcement learning of language models with fused losses.", allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(takes_overrides=False, interrupted="")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    train.add_parsers(commands)
    eval.add_parser(commands)
    sample.add_parser(commands)
    vllm_serve.add_parser(commands)
    plot.add_parser(commands)
    bench.add_parser(commands)
    doctor.add_parser(commands)
    return parser
