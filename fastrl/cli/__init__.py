"""The command `fastrl`: one subcommand per file of this folder, each with its own arguments."""

from fastrl.cli.main import main

__all__ = ["main"]
