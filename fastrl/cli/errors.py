"""The error of a command's user: shown as one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a configuration, a command line or the surroundings; the message says what and where."""
