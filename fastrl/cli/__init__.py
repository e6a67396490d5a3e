"""The command `fastrl`: a file of this folder per subcommand, and `train` for those that train."""

from fastrl.cli.main import main

__all__ = ["main"]
