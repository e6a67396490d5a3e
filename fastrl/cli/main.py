"""Entry point of `fastrl`: parses the subcommand and turns a user's mistake into one line on stderr.

Exit codes: 0 success, 1 a failed check or an unexpected error (then with its traceback), 2 a user's mistake or a full
disk, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

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
        with _terminated_like_interrupted():
            return int(arguments.run(arguments))
    except (UserError, OSError, KeyboardInterrupt) as error:
        code, message = _explained(error, arguments.interrupted)
        if code is None:
            raise
        if arguments.debug:
            traceback.print_exc()
        print(f"fastrl {arguments.command}: {message}", file=sys.stderr)
        return code


def _explained(error: BaseException, hint: str) -> tuple[int | None, str]:
    """The exit code and the line for an error; None: one that is not expected."""
    if isinstance(error, UserError):
        return 2, " ".join(str(error).split())
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return (2 if full else None), f"{error}: make room, then run the command again{hint}"
    if isinstance(error, Terminated):
        return 143, f"terminated{hint}"
    print(file=sys.stderr)  # the terminal shows ^C
    return 130, f"interrupted{hint}"


class Terminated(KeyboardInterrupt):
    """SIGTERM: what an interruption cleans up is cleaned up then, too."""


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    process = os.getpid()

    def terminate(*_: Any) -> None:
        if os.getpid() != process:  # a worker of datasets inherits this, and is ended by SIGTERM
            os._exit(143)
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
