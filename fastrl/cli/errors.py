"""The error of a command's user: shown as one line, without a traceback."""

from __future__ import annotations

import traceback
from pathlib import Path


class UserError(Exception):
    """A mistake in a configuration, a command line or the surroundings; the message says what and where."""


def raised_by_fastrl(error: BaseException) -> bool:
    """Whether fastrl itself refused something: then the message is for the user, otherwise the traceback is."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])
