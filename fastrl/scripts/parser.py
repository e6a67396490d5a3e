"""The parser of TRL's training scripts: dataclasses from the command line and a YAML file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from typing import Any

from transformers import HfArgumentParser

from fastrl.cli.config import read_yaml
from fastrl.cli.errors import UserError


class TrlParser(HfArgumentParser):
    """`transformers.HfArgumentParser` with `--config FILE.yaml`, whose values are overridden by the command line.

    The file's key `env` sets environment variables. Its text is YAML 1.2: `no` is a word and `1e-5` a number.

    Raises:
        ValueError: a dataclass has a field "config".
    """

    def __init__(self, dataclass_types: type | Iterable[type] | None = None, **kwargs: Any) -> None:
        types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types or [])
        for cls in types:
            if "config" in cls.__dataclass_fields__:  # type: ignore[attr-defined]
                raise ValueError(f"{cls.__name__} has a field named 'config', which stands for the file's path")
        super().__init__(types, **kwargs)  # type: ignore[arg-type]

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """One instance of each dataclass.

        Args:
            args: the words of the command line; None: the process's.
            return_remaining_strings: append a list of the words that no dataclass has a field for, the file's first;
                otherwise unknown words of the command line are an error.
            fail_with_unknown_args: whether unknown keys of the file are an error, unless they are returned.
            separate_remaining_strings: return the file's and the command line's as two lists.

        Raises:
            ValueError: the file can't be used, or an unknown argument.
        """
        words = list(sys.argv[1:] if args is None else args)
        unknown = self._read_config(words)
        parsed = self.parse_args_into_dataclasses(words, return_remaining_strings=return_remaining_strings)
        if return_remaining_strings:
            *instances, rest = parsed
            return (*instances, unknown, rest) if separate_remaining_strings else (*instances, unknown + rest)
        if unknown and fail_with_unknown_args:
            raise ValueError(
                f"the file of --config has unknown arguments: {' '.join(unknown)}; remove them, or set "
                "fail_with_unknown_args=False"
            )
        return parsed

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Makes values the defaults of the arguments of their names, also in subparsers; those are no longer required.

        Returns:
            What has no argument, as words of a command line.
        """
        known = _set_defaults(self, kwargs)
        return [word for key, value in kwargs.items() if key not in known for word in (f"--{key}", str(value))]

    def _read_config(self, words: list[str]) -> list[str]:
        """Takes `--config FILE` out of the words and its values as defaults; returns what has no argument."""
        place = next((i for i, word in enumerate(words) if word == "--config" or word.startswith("--config=")), None)
        if place is None:
            return []
        _, equals, path = words.pop(place).partition("=")
        if not equals:
            if place == len(words):
                self.error("argument --config: expected a file")
            path = words.pop(place)
        try:
            values = {key: setting.value for key, setting in read_yaml(path).items()}
        except UserError as error:
            raise ValueError(str(error)) from error
        environment = values.pop("env", {})
        if not isinstance(environment, dict):
            raise ValueError(f"{path}: env: expected a mapping of names to values, got {environment!r}")
        os.environ.update({name: str(value) for name, value in environment.items()})
        return self.set_defaults_with_config(**values)


def _set_defaults(parser: argparse.ArgumentParser, values: dict[str, Any]) -> set[str]:
    known: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                known |= _set_defaults(subparser, values)
        elif action.dest in values:
            action.default, action.required = values[action.dest], False
            known.add(action.dest)
    return known
