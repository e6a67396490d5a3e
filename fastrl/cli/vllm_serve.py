"""`fastrl vllm-serve`: a vLLM server, which a run with `vllm_mode="server"` samples from."""

from __future__ import annotations

import argparse

from fastrl.cli.errors import UserError, raised_by_fastrl


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command; its options are those of `python -m fastrl.rollout.vllm_server`."""
    parser = subparsers.add_parser(
        "vllm-serve", help="serve a model by vLLM to runs with vllm_mode=server", add_help=False, allow_abbrev=False
    )
    parser.set_defaults(run=run, takes_overrides=True)


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM. Returns 0.

    Raises:
        UserError: vLLM is not installed, or an option of it that is not supported.
    """
    from fastrl.rollout import vllm_server

    try:
        vllm_server.main(arguments.overrides)
    except (ValueError, ImportError) as error:
        if not raised_by_fastrl(error):
            raise
        raise UserError(str(error)) from error
    return 0
