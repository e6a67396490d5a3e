"""Calls the user's reward functions and turns what they return into one tensor, or into one error that names the
function at fault. Never guesses: a reward that is NaN, infinite or not a number is an error, `None` is "no reward"."""

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

RewardFunction = Callable[..., Any]


class RewardFunctionError(ValueError):
    """A reward function raised, or returned something else than one number or None per completion."""


class RewardRunner:
    """The reward functions of a run.

    A function is called as `f(prompts=, completions=, completion_ids=, trainer_state=, log_metric=, **columns)` with
    one entry per completion in each list, and returns one number or None (no reward) per completion. `log_metric(name,
    value)` adds a metric of the function's own to the logs. Arguments that its signature does not take are left out,
    so that `def f(completions)` works. Async functions run concurrently, on one event loop
    that lives as long as the runner (clients that keep connections depend on it).

    Args:
        functions: one or several functions, or callable objects.
        weights: one per function, or None for ones.

    Raises:
        TypeError: something that is not callable, or a reward model, which is not supported yet.
        ValueError: no function, or another number of weights than of functions.
    """

    def __init__(
        self, functions: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None = None
    ) -> None:
        self.functions = [functions] if callable(functions) else list(functions)
        if not self.functions:
            raise ValueError("reward_funcs: expected at least one reward function, got none")
        for i, function in enumerate(self.functions):
            if isinstance(function, (nn.Module, str)):
                raise TypeError(
                    f"reward_funcs[{i}]: reward models are not supported yet; pass a function that calls the model"
                )
            if not callable(function):
                raise TypeError(f"reward_funcs[{i}]: expected a function, got {type(function).__name__}")
        self.names = _unique([_name(function) for function in self.functions])
        count = len(self.functions)
        if weights is not None and len(weights) != count:
            raise ValueError(f"reward_weights: expected {count} weights, one per reward function, got {len(weights)}")
        self.weights = torch.ones(count) if weights is None else torch.tensor(weights, dtype=torch.float32)
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
        trainer_state: Any,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> Tensor:
        """Rewards (B, F) fp32, NaN where a function returned None. Without log_metric, such metrics are dropped.

        Raises:
            RewardFunctionError: see there; the original exception is its cause.
        """
        arguments = {
            **columns,
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            "trainer_state": trainer_state,
            "log_metric": log_metric or (lambda name, value: None),
        }
        returned: list[Any] = [None] * len(self.functions)
        pending: dict[int, Awaitable[Any]] = {}
        for i, (function, name) in enumerate(zip(self.functions, self.names, strict=True)):
            try:
                result = function(**_accepted(function, arguments))
            except Exception as error:
                raise _raised(name, error) from error
            if inspect.isawaitable(result):
                pending[i] = result
            else:
                returned[i] = result
        for i, result in self._run_async(pending).items():
            if isinstance(result, BaseException):
                raise _raised(self.names[i], result) from result
            returned[i] = result
        columns_of_rewards = [
            _checked(result, len(completions), name) for result, name in zip(returned, self.names, strict=True)
        ]
        return torch.tensor(columns_of_rewards, dtype=torch.float32).T.contiguous()

    def _run_async(self, pending: dict[int, Awaitable[Any]]) -> dict[int, Any]:
        if not pending:
            return {}
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="fastrl-rewards", daemon=True).start()

        async def gather() -> list[Any]:
            return await asyncio.gather(*pending.values(), return_exceptions=True)

        results = asyncio.run_coroutine_threadsafe(gather(), self._loop).result()
        return dict(zip(pending, results, strict=True))


def _name(function: RewardFunction) -> str:
    if isinstance(function, partial):
        return _name(function.func)
    return getattr(function, "__name__", type(function).__name__)


def _unique(names: list[str]) -> list[str]:
    """Numbers the repeats, so that two functions of one name do not share a metric."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return unique


def _accepted(function: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return arguments
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return arguments
    named = {parameter.name for parameter in parameters}
    return {name: value for name, value in arguments.items() if name in named}


def _raised(name: str, error: BaseException) -> RewardFunctionError:
    return RewardFunctionError(f"reward function '{name}' raised {type(error).__name__}: {error}")


def _checked(result: Any, expected: int, name: str) -> list[float]:
    if hasattr(result, "tolist"):  # a tensor or an array
        result = result.tolist()
    if isinstance(result, str | dict) or not hasattr(result, "__len__") or not hasattr(result, "__iter__"):
        raise RewardFunctionError(
            f"reward function '{name}' returned {type(result).__name__}: expected a list with one number or None for "
            f"each of the {expected} completions"
        )
    if len(result) != expected:
        raise RewardFunctionError(
            f"reward function '{name}' returned {len(result)} rewards for {expected} completions: expected one each"
        )
    return [_number(value, name, i) for i, value in enumerate(result)]


def _number(value: Any, name: str, index: int) -> float:
    if value is None:
        return math.nan
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise RewardFunctionError(
            f"reward function '{name}' returned {value!r} ({type(value).__name__}) for completion {index}: expected a "
            "number or None"
        )
    number = float(value)
    if not math.isfinite(number):
        raise RewardFunctionError(
            f"reward function '{name}' returned {number} for completion {index}: expected a finite number, or None "
            "for no reward"
        )
    return number
