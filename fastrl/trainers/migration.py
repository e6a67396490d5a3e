"""Tables of TRL's arguments against ours, made from the code: `python -m fastrl.trainers.migration` writes them.

They need TRL 1.16. Without it `missing` still says which arguments of ours a page does not name, and `outdated` which
rows say something else than the code.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from fastrl.trainers import (
    DistillationConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
)
from fastrl.trainers.online_config import REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
# In the order of the pipelines; TRL 1.16 has no PPOConfig.
CONFIGS: Mapping[str, type] = {
    config.__name__: config
    for config in (SFTConfig, RewardConfig, DPOConfig, KTOConfig, PPOConfig, GRPOConfig, DistillationConfig)
}

_ROW = r"^\| `(\w+)` \| (`.*?`) \| (.*) \|$"


def here(config: type, name: str, default: str) -> str:
    """What becomes of an argument of TRL's, with TRL's default as it is printed: the last cell of its row."""
    field = _fields(config).get(name)
    if field is None:
        return "refused: there is no such argument"
    refused: Mapping[str, tuple[Any, str]] = getattr(config, "REFUSED", REFUSED)  # a class's own, or the online ones
    if name in refused:
        only, why = refused[name]
        return f"refused unless {_code(only)}: {why}"
    if field.metadata.get("help", "").startswith("Only "):
        return f"o{field.metadata['help'][1:].rstrip('.')}"
    ours = _code(_default(field))
    return "same" if ours == default else f"default {ours}"


def rows(config: type) -> Iterator[str]:
    """The table of one configuration. Arguments of `transformers.TrainingArguments` are left out where all agree."""
    import trl

    theirs, plain = _fields(getattr(trl, config.__name__)), _fields(TrainingArguments)
    yield "| argument | TRL's default | here |"
    yield "|---|---|---|"
    for name, field in theirs.items():
        default = _code(_default(field))
        cell = here(config, name, default)
        if name not in plain or _code(_default(plain[name])) != default or cell != "same":
            yield f"| `{name}` | {default} | {cell} |"


def own(config: type, names: set[str]) -> Iterator[str]:
    """Arguments of ours that are not among TRL's."""
    for name, field in _fields(config).items():
        if name not in names:
            yield f"- `{name}` = {_code(_default(field))}: {field.metadata.get('help', '')}"


def section(config: type) -> str:
    """The text that stands between the marks of a configuration."""
    import trl

    theirs = getattr(trl, config.__name__, None)
    if theirs is None:
        return "\n".join(own(config, set(_fields(config)) - _differing(config)))
    added = "\n".join(own(config, set(_fields(theirs))))
    return "\n".join(rows(config)) + f"\n\nAdded here:\n\n{added}"


def filled(page: str) -> str:
    """A page with what stands between `<!-- table: NAME -->` and `<!-- end -->` made anew."""
    for name, config in CONFIGS.items():
        old = _between(page, name)
        page = page.replace(old, f"{_start(name)}{section(config)}\n<!-- end -->")
    return page


def missing(page: str) -> list[str]:
    """Arguments of ours that the page does not name, as "Config.argument"."""
    absent = []
    for name, config in CONFIGS.items():
        named = set(re.findall(r"^(?:\| |- )`(\w+)`", _between(page, name), re.MULTILINE))
        absent += [f"{name}.{argument}" for argument in _fields(config) if argument in _differing(config) - named]
    return absent


def outdated(page: str) -> list[str]:
    """Rows of the page whose last cell is not what the code says."""
    wrong = []
    for name, config in CONFIGS.items():
        for argument, default, cell in re.findall(_ROW, _between(page, name), re.MULTILINE):
            if cell != here(config, argument, default):
                wrong.append(f"{name}.{argument}: {cell}")
    return wrong


def _between(page: str, name: str) -> str:
    start = page.find(_start(name))
    end = page.find("<!-- end -->", start)
    if start < 0 or end < 0:
        raise ValueError(f"the page has no {_start(name).strip()}")
    return page[start : end + len("<!-- end -->")]


def _start(name: str) -> str:
    return f"<!-- table: {name} -->\n"


def _fields(config: type) -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(config) if field.init}


def _differing(config: type) -> set[str]:
    """Arguments that `transformers.TrainingArguments` does not have, or not with this default."""
    plain = _fields(TrainingArguments)
    return {
        name
        for name, field in _fields(config).items()
        if name not in plain or _code(_default(plain[name])) != _code(_default(field))
    }


def _default(field: Any) -> Any:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return value.value if isinstance(value, enum.Enum) else value


def _code(value: Any) -> str:
    return f"`{value!r}`".replace("|", "\\|")


def main() -> None:
    """Rewrite the tables of the page."""
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
