"""Reward functions by name, for configuration files: a name from here or the import path of the user's own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from fastrl.rewards.form import think_format_reward
from fastrl.rewards.verifiable import exact_number_reward, final_answer_reward, reasoning_gym_reward
from fastrl.suggestions import did_you_mean

REWARD_FUNCS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (exact_number_reward, final_answer_reward, reasoning_gym_reward, think_format_reward)
}


def get_reward_func(name: str) -> Callable[..., Any]:
    """A reward function of fastrl by its name, or one by its import path, for example "my_project.rewards.brevity".

    Modules are also looked for in the working directory.

    Raises:
        ValueError: unknown name, a module that can't be imported, or an object that is not callable.
    """
    if name in REWARD_FUNCS:
        return REWARD_FUNCS[name]
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise ValueError(
            f"unknown reward function {name!r}{did_you_mean(name, REWARD_FUNCS)} "
            f"(known: {', '.join(sorted(REWARD_FUNCS))}, or an import path such as my_module.my_reward)"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward function {name!r} can't be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"reward function {name!r} is not callable but a {type(function).__name__}")
    return function
