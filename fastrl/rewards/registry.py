"""Reward functions by name, for configuration files: a name from here or the import path of the user's own, with
arguments where the name is that of a function that makes one."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from fastrl.rewards.form import (
    get_length_penalty_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    think_format_reward,
)
from fastrl.rewards.math_answers import accuracy_reward, get_cosine_scaled_reward, reasoning_accuracy_reward
from fastrl.rewards.verifiable import (
    exact_number_reward,
    extracted_answer_reward,
    final_answer_reward,
    reasoning_gym_reward,
)
from fastrl.suggestions import did_you_mean

REWARD_FUNCS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        accuracy_reward,
        exact_number_reward,
        extracted_answer_reward,
        final_answer_reward,
        get_cosine_scaled_reward,
        get_length_penalty_reward,
        get_repetition_penalty_reward,
        get_soft_overlong_punishment,
        reasoning_accuracy_reward,
        reasoning_gym_reward,
        think_format_reward,
    )
}


def get_reward_func(name: str) -> Callable[..., Any]:
    """A reward function of fastrl by its name, or one by its import path, for example "my_project.rewards.brevity".

    A name with arguments is a function that returns the reward function: "get_length_penalty_reward(max_len=256)".
    Modules are also looked for in the working directory.

    Raises:
        ValueError: unknown name, a module that can't be imported, an object that is not callable, or arguments that it
            refuses.
    """
    if "(" not in name:
        function = _named(name)
        if name in REWARD_FUNCS and name.startswith("get_"):
            settings = ", ".join(map(str, inspect.signature(function).parameters.values()))
            raise ValueError(f"reward function {name!r} needs arguments, as key=value: {name}({settings})")
        return function
    try:
        call = ast.parse(name, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(item.arg is None for item in call.keywords):
            raise ValueError("expected name(key=value, ...)")
        arguments = {str(item.arg): ast.literal_eval(item.value) for item in call.keywords}
        return _named(ast.unparse(call.func))(**arguments)
    except (SyntaxError, ValueError, TypeError) as error:
        raise ValueError(f"reward function {name!r}: {error}") from error


def _named(name: str) -> Callable[..., Any]:
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
