"""Calls the user's reward functions and turns what they return into one tensor.

Never guesses: a reward that is NaN, infinite or not a number is an error that names the function, `None` is "no
reward". A function that raises or hangs costs the rewards of the completions at fault, not the run."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from fastrl.rewards.calls import CallRunner, CallTimeoutError
from fastrl.rewards.model import with_reward_models

if TYPE_CHECKING:
    from fastrl.trainers.online_config import OnlineConfig

logger = logging.get_logger(__name__)

RewardFunction = Callable[..., Any]
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_LARGEST = torch.finfo(torch.float32).max  # rewards are kept in fp32
_GIVEN = ("trainer_state", "log_metric", "log_extra")  # to every function, besides one list per column


class RewardFunctionError(ValueError):
    """A reward function returned something else than one number or None per completion, lacks a column or a package, or
    failed for every completion of several batches in a row."""


class RewardRunner:
    """The reward functions of a run.

    A function is called as `f(prompts=, completions=, completion_ids=, trainer_state=, log_metric=, log_extra=,
    **columns)` with one entry per completion in each list, and returns one number or None (no reward) per completion.
    `log_metric(name, value)` adds a metric of the function's own to the logs, `log_extra(column, values)` a column to
    the table of completions. Arguments that its signature does not take are left out, so that `def f(completions)`
    works. Async functions run concurrently.

    **Failures.** A call that raises, or takes longer than `timeout`, can't say which completion was at fault, so the
    function is called again for each completion alone; those that fail again get no reward from it. Their number is
    logged as `rewards/<name>/errors` and `rewards/<name>/timeouts` (from the function's first failure on), and the
    first failure is shown with its traceback. A function that fails for every completion of `max_failed_batches`
    batches in a row ends the run. Rewards that depend on the other completions of the batch don't survive this: a
    function that compares completions should not raise.

    Args:
        functions: one or several functions, or callable objects such as `fastrl.rewards.RewardModel`.
        weights: one per function, or None for ones.
        timeout: seconds that a call may take: for the batch, then for each completion alone. None: no limit, and the
            functions are called in turn in the calling thread, as TRL does. See `fastrl.rewards.calls.CallRunner`.
        workers: calls at a time where there is a limit.
        max_failed_batches: see above.

    Raises:
        TypeError: something that is not callable, or a model that is not wrapped in a RewardModel.
        ValueError: no function, another number of weights than of functions, or a limit that is not positive.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        *,
        timeout: float | None = None,
        workers: int = 8,
        max_failed_batches: int = 3,
    ) -> None:
        self.functions = [functions] if callable(functions) else list(functions)
        if not self.functions:
            raise ValueError("reward_funcs: expected at least one reward function, got none")
        for i, function in enumerate(self.functions):
            if isinstance(function, (nn.Module, str)):
                raise TypeError(
                    f"reward_funcs[{i}]: expected a function, got {type(function).__name__}; a reward model is passed "
                    "as fastrl.rewards.RewardModel(model)"
                )
            if not callable(function):
                raise TypeError(f"reward_funcs[{i}]: expected a function, got {type(function).__name__}")
        self.names = _unique([_name(function) for function in self.functions])
        count = len(self.functions)
        if weights is not None and len(weights) != count:
            raise ValueError(f"reward_weights: expected {count} weights, one per reward function, got {len(weights)}")
        self.weights = torch.ones(count) if weights is None else torch.tensor(weights, dtype=torch.float32)
        if max_failed_batches < 1:
            raise ValueError(f"max_failed_reward_batches: expected at least 1, got {max_failed_batches}")
        self.max_failed_batches = max_failed_batches
        self._calls = CallRunner(timeout, workers)
        self._has_failed = [False] * count
        self._failed_batches = [0] * count  # in a row, up to now

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        trainer_state: Any,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
    ) -> Tensor:
        """Rewards (B, F) fp32, NaN where a function gave none. Metrics and columns without a logger are dropped.

        Raises:
            RewardFunctionError: see there; the original exception is its cause.
        """
        lists = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        for function, name in zip(self.functions, self.names, strict=True):
            _check_columns(function, name, {*lists, *_GIVEN})
        calls = [
            _RewardCall(function, name, lists, trainer_state)
            for function, name in zip(self.functions, self.names, strict=True)
        ]
        results = self._calls.run(calls, f"reward functions {', '.join(self.names)}")
        rewards = []
        for i, (call, result) in enumerate(zip(calls, results, strict=True)):
            if isinstance(result, Exception):
                rewards.append(self._each_alone(i, call, result, log_metric))
            else:
                rewards.append(_checked(result, len(completions), call.name))
                self._count_failures(i, [], len(completions), log_metric)
            call.forward(log_metric, log_extra)
        return torch.tensor(rewards, dtype=torch.float32).T.contiguous()

    def _each_alone(
        self, i: int, call: _RewardCall, error: Exception, log_metric: Callable[[str, float], None] | None
    ) -> list[float]:
        if isinstance(error, ImportError):  # the next batch will not find it either
            raise _raised(call.name, error) from error
        alone = [call.of_completion(j) for j in range(call.size)]
        results = self._calls.run(alone, f"reward function {call.name}")
        rewards = [
            math.nan if isinstance(result, Exception) else _checked(result, 1, call.name)[0] for result in results
        ]
        call.join(alone, [not isinstance(result, Exception) for result in results])
        if not self._has_failed[i]:
            self._has_failed[i] = True
            shown = "".join(traceback.format_exception(error)).rstrip()
            logger.warning(
                f"{_raised(call.name, error)}. Called again for each completion alone, it failed for "
                f"{sum(map(math.isnan, rewards))} of {call.size}; such completions get no reward from it.\n{shown}"
            )
        failures = [result for result in results if isinstance(result, Exception)]
        self._count_failures(i, failures, call.size, log_metric)
        return rewards

    def _count_failures(
        self, i: int, failures: list[Exception], size: int, log_metric: Callable[[str, float], None] | None
    ) -> None:
        if self._has_failed[i] and log_metric is not None:
            timeouts = sum(isinstance(error, CallTimeoutError) for error in failures)
            log_metric(f"rewards/{self.names[i]}/errors", float(len(failures) - timeouts))
            log_metric(f"rewards/{self.names[i]}/timeouts", float(timeouts))
        self._failed_batches[i] = self._failed_batches[i] + 1 if failures and len(failures) == size else 0
        if self._failed_batches[i] >= self.max_failed_batches:
            raise RewardFunctionError(
                f"{_raised(self.names[i], failures[0])}, and so for every completion of {self._failed_batches[i]} "
                "batches in a row"
            ) from failures[0]


def reward_runner(functions: Any, processing_classes: Any, args: OnlineConfig) -> RewardRunner:
    """The reward functions and models of a trainer with the limits and weights of its arguments; see
    `fastrl.rewards.with_reward_models`."""
    functions = with_reward_models(
        functions,
        processing_classes,
        device=args.device,
        chat_template_kwargs=args.chat_template_kwargs,
        trust_remote_code=args.trust_remote_code,
    )
    return RewardRunner(
        functions,
        args.reward_weights,
        timeout=args.reward_timeout,
        workers=args.reward_workers,
        max_failed_batches=args.max_failed_reward_batches,
    )


@dataclass
class _RewardCall:
    """One call of a reward function; what it logs is kept until it is known to count."""

    function: RewardFunction
    name: str
    lists: Mapping[str, Sequence[Any]]  # one entry per completion
    trainer_state: Any
    metrics: list[tuple[str, float]] = field(default_factory=list)
    extras: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Completions."""
        return len(self.lists["completions"])

    def __call__(self) -> Any:
        """What the function returns."""
        metrics: list[tuple[str, float]] = []  # not self.metrics: a call that was given up may still write here
        extras: dict[str, list[Any]] = {}
        self.metrics, self.extras = metrics, extras
        arguments = {
            **self.lists,
            "trainer_state": self.trainer_state,
            "log_metric": lambda name, value: metrics.append((name, value)),
            "log_extra": lambda column, values: extras.__setitem__(column, list(values)),
        }
        return self.function(**_accepted(self.function, arguments))

    def of_completion(self, j: int) -> _RewardCall:
        """The call for one completion."""
        lists = {name: values[j : j + 1] for name, values in self.lists.items()}
        return _RewardCall(self.function, self.name, lists, self.trainer_state)

    def join(self, alone: Sequence[_RewardCall], succeeded: Sequence[bool]) -> None:
        """Takes what the calls for each completion logged: columns have None where a call failed."""
        valid = [call for call, counts in zip(alone, succeeded, strict=True) if counts]
        self.metrics = [metric for call in valid for metric in call.metrics]
        columns = dict.fromkeys(column for call in valid for column in call.extras)
        self.extras = {
            column: [
                call.extras.get(column, [None])[0] if counts else None
                for call, counts in zip(alone, succeeded, strict=True)
            ]
            for column in columns
        }

    def forward(
        self,
        log_metric: Callable[[str, float], None] | None,
        log_extra: Callable[[str, list[Any]], None] | None,
    ) -> None:
        """Hands on what was logged."""
        for name, value in self.metrics if log_metric is not None else ():
            log_metric(name, value)  # type: ignore[misc]
        for column, values in self.extras.items() if log_extra is not None else ():
            log_extra(column, values)  # type: ignore[misc]


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


def _check_columns(function: RewardFunction, name: str, given: Collection[str]) -> None:
    needed = [p.name for p in _parameters(function) or () if p.default is p.empty and p.kind in _BY_NAME]
    missing = [parameter for parameter in needed if parameter not in given]
    if missing:
        raise RewardFunctionError(
            f"reward function '{name}' needs the column {missing[0]!r}, which the dataset does not have"
        )


def _accepted(function: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    parameters = _parameters(function)
    if parameters is None or any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return arguments
    named = {parameter.name for parameter in parameters}
    return {name: value for name, value in arguments.items() if name in named}


def _parameters(function: RewardFunction) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return None


def _raised(name: str, error: BaseException) -> RewardFunctionError:
    if isinstance(error, CallTimeoutError):
        return RewardFunctionError(f"reward function '{name}' gave {error} (reward_timeout)")
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
    if not abs(number) <= _LARGEST:
        raise RewardFunctionError(
            f"reward function '{name}' returned {number} for completion {index}: expected a finite number, or None "
            "for no reward"
        )
    return number
