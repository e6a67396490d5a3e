"""A YAML file and `--key value` overrides as dataclasses, checked key by key and type by type.

The keys are the fields of the dataclasses. An unknown key, a value of the wrong type and a missing key each raise a
`UserError` that names the key and the place it came from; nothing is ignored.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastrl.cli.errors import UserError
from fastrl.suggestions import did_you_mean


@dataclasses.dataclass(frozen=True)
class Setting:
    """One value, and where it was written: a file, or the option of a command line."""

    value: Any
    place: str


def read_yaml(path: str | Path) -> dict[str, Setting]:
    """The top-level keys of a YAML file, by the rules of YAML 1.2: `no` is a word, `1e-5` is a number.

    Raises:
        UserError: the file can't be read, is not a mapping, or says one key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from error
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: expected lines of the form `key: value`")
    return {key: Setting(value, str(path)) for key, value in content.items()}


def read_overrides(arguments: Sequence[str]) -> dict[str, Setting]:
    """`--key value`, `--key=value` and `--key a b c` (a list) as settings; values are read as YAML. A bare `--key`
    switches a key on that is true or false, and `--no_key` off.

    Raises:
        UserError: something that is not an option, or one given twice.
    """
    settings: dict[str, Setting] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not re.match(r"--[A-Za-z]", option):
            raise UserError(f"unexpected argument {option!r}; options have the form --key value")
        option, equals, value = option.partition("=")
        values = [value] if equals else []
        while not equals and rest and not re.match(r"--[A-Za-z]", rest[0]):
            values.append(rest.pop(0))
        key = option[2:].replace("-", "_")
        if key in settings:
            raise UserError(f"{option} is given twice")
        parsed = [_CommandLineValue(value) for value in values]
        settings[key] = Setting(parsed[0] if len(parsed) == 1 else parsed or _Switch(), option)
    return settings


def build(classes: Sequence[type], settings: Mapping[str, Setting], *, required: Sequence[str] = ()) -> list[Any]:
    """One instance of each dataclass, every setting going to the class that has a field of its name.

    Raises:
        UserError: an unknown key, a value of the wrong type, a missing required key, or values that a dataclass
            refuses together.
    """
    annotations: dict[str, Any] = {}
    owner: dict[str, type] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.init and field.name not in owner:  # the first class that has a name owns it
                annotations[field.name], owner[field.name] = hints[field.name], cls
    settings = _switched(settings, annotations)
    for key, setting in settings.items():
        if key not in owner:
            if setting.place.startswith("--"):
                close = did_you_mean(setting.place, [f"--{name}" for name in owner])
                raise UserError(f"{setting.place}: unknown option{close}")
            raise UserError(f"{setting.place}: unknown key {key!r}{did_you_mean(key, owner)}")
    missing = [key for key in required if key not in settings]
    if missing:
        raise UserError(f"missing: {', '.join(missing)} (in the file of --config, or as --{missing[0]} ...)")

    values: dict[type, dict[str, Any]] = {cls: {} for cls in classes}
    for key, setting in settings.items():
        try:
            values[owner[key]][key] = coerce(setting.value, annotations[key])
            if values[owner[key]][key] is None and key in required:
                raise ValueError("expected a value, got null")
        except ValueError as error:
            what = "" if setting.place.startswith("--") else f"{key}: "
            raise UserError(f"{setting.place}: {what}{error}") from None
    built = []
    for cls in classes:
        try:
            built.append(cls(**values[cls]))
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(f"{cls.__name__} refuses the configuration: {error}") from error
    return built


def coerce(value: Any, annotation: Any) -> Any:
    """`value` as the type that `annotation` asks for; no lossy conversion, and none from text to a number.

    Raises:
        ValueError: it does not fit; the message says what was expected.
    """
    if isinstance(value, _CommandLineValue):
        return _coerce_command_line(value, annotation)
    if isinstance(value, list) and any(isinstance(item, _CommandLineValue) for item in value):
        return coerce(
            [item.text if _takes_text_items(annotation) else item.parsed() for item in value],
            annotation,
        )
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or isinstance(annotation, (str, typing.TypeVar)):
        return value
    if origin in (typing.Union, types.UnionType):
        enums = [arm for arm in arguments if isinstance(arm, type) and issubclass(arm, enum.Enum)]
        # In `SchedulerType | str` the text is the spelling of a member, not any text.
        for arm in enums if enums and isinstance(value, str) else arguments:
            try:
                return coerce(value, arm)
            except ValueError:
                continue
        raise ValueError(f"expected {_describe(annotation)}, got {value!r}")
    if annotation is type(None):
        fits = value is None
    elif origin is typing.Literal:
        if value not in arguments or not any(type(value) is type(choice) for choice in arguments):
            close = did_you_mean(str(value), [str(choice) for choice in arguments])
            raise ValueError(f"expected {_describe(annotation)}, got {value!r}{close}")
        fits = True
    elif origin in (dict, Mapping) or annotation is dict:
        if isinstance(value, dict):
            item = arguments[1] if len(arguments) == 2 else Any
            return {key: coerce(entry, item) for key, entry in value.items()}
        fits = False
    elif origin in (list, tuple, Sequence) or annotation in (list, tuple):
        if isinstance(value, list):
            entries = [coerce(entry, arguments[0] if arguments else Any) for entry in value]
            return tuple(entries) if tuple in (origin, annotation) else entries
        fits = False
    elif annotation is bool:
        fits = isinstance(value, bool)
    elif annotation is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif annotation is float:
        if isinstance(value, int) and not isinstance(value, bool):
            return float(value)  # transformers refuses a temperature of 2 that is not 2.0
        fits = isinstance(value, float)
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        for member in annotation:
            if value in (member.value, member.name, member):
                return member
        raise ValueError(f"expected {_describe(annotation)}, got {value!r}")
    elif dataclasses.is_dataclass(annotation) and isinstance(value, dict):
        return _coerce_entries(value, annotation)
    elif isinstance(annotation, type):
        fits = isinstance(value, annotation)
    else:  # a callable or another thing that a file can't hold
        fits = False
    if not fits:
        raise ValueError(f"expected {_describe(annotation)}, got {value!r}")
    return value


def _coerce_entries(entries: dict[Any, Any], cls: Any) -> Any:
    hints = typing.get_type_hints(cls)
    for key in entries:
        if key not in hints:
            raise ValueError(f"unknown key {key!r}{did_you_mean(str(key), hints)}")
    try:
        return cls(**{key: coerce(value, hints[key]) for key, value in entries.items()})
    except TypeError as error:  # one without a default is missing
        raise ValueError(f"{entries!r}: {error}") from error


class _Switch:
    """A bare `--key`."""


def _switched(settings: Mapping[str, Setting], annotations: Mapping[str, Any]) -> dict[str, Setting]:
    """Bare options as true, and false where they say `no_` before a key; both only for keys that are true or false."""
    switched: dict[str, Setting] = {}
    for key, setting in settings.items():
        if isinstance(setting.value, _Switch):
            off = key not in annotations and key.startswith("no_") and key[3:] in annotations
            name = key[3:] if off else key
            annotation = annotations.get(name, bool)  # an unknown option is build's to refuse
            if bool not in (annotation, *typing.get_args(annotation)):
                raise UserError(f"{setting.place} needs a value")
            key, setting = name, Setting(not off, setting.place)
        if key in switched and switched[key].place.startswith("--"):  # otherwise it overrides the file's
            raise UserError(f"{switched[key].place} and {setting.place} exclude each other")
        switched[key] = setting
    return switched


class _CommandLineValue:
    """A word of the command line: YAML where that fits the field, otherwise the bare text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def parsed(self) -> Any:
        try:
            return yaml.load(self.text, _Loader)
        except yaml.YAMLError:
            return self.text

    def __repr__(self) -> str:
        return repr(self.text)


def _coerce_command_line(word: _CommandLineValue, annotation: Any) -> Any:
    # A path or a name stays what was typed: `--run_name 007` is not the number 7.
    candidates = [word.text, word.parsed()] if annotation is str else [word.parsed(), word.text]
    if not isinstance(word.parsed(), (list, dict)):
        candidates.append([word.text])  # one word for a list
    for candidate in candidates:
        try:
            return coerce(candidate, annotation)
        except ValueError:
            continue
    return coerce(word.parsed(), annotation)  # raises, with its message


def _takes_text_items(annotation: Any) -> bool:
    arms = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    return any(typing.get_origin(arm) is list and typing.get_args(arm) == (str,) for arm in (*arms, annotation))


def _describe(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        enums = [arm for arm in arguments if isinstance(arm, type) and issubclass(arm, enum.Enum)]
        parts = [_describe(arm) for arm in arguments if not (enums and arm is str)]
        return " or ".join(dict.fromkeys(parts))
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin in (list, tuple, Sequence):
        return f"a list of {_describe(arguments[0])}" if arguments else "a list"
    if origin in (dict, Mapping):
        return "a mapping"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "one of " + ", ".join(repr(member.value) for member in annotation)
    names: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        tuple: "a list",
        dict: "a mapping",
        type(None): "null",
    }
    return names.get(annotation) or str(getattr(annotation, "__name__", annotation))


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core rules for plain words, and an error for a repeated key."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1, PyYAML's dialect, reads `no` as False (as in `save_strategy: no`) and `1e-5` as text.
_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"),
    list("-+0123456789."),
)
