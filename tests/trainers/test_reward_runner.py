"""Reward functions: how they are called, and one clear error for each way in which they can misbehave."""

import asyncio
import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastrl.trainers.reward_runner import RewardFunctionError, RewardRunner

CALL: dict[str, Any] = {
    "prompts": ["p", "p"],
    "completions": ["x", "y z"],
    "completion_ids": [[1], [2, 3]],
    "columns": {"answer": ["1", "2"]},
    "trainer_state": "state",
    "log_metric": print,
}


def test_arguments_and_values() -> None:
    seen: dict[str, Any] = {}

    def everything(**kwargs: Any) -> list[Any]:
        seen.update(kwargs)
        return [1, None]

    def only_completions(completions: list[str]) -> list[float]:
        return [float(len(c)) for c in completions]

    def only_a_column(answer: list[str], trainer_state: Any) -> list[bool]:
        return [a == "2" and trainer_state == "state" for a in answer]

    rewards = RewardRunner([everything, only_completions, only_a_column])(**CALL)
    assert rewards.dtype == torch.float32
    assert math.isnan(rewards[1, 0])
    assert rewards[:, 1:].tolist() == [[1.0, 0.0], [3.0, 1.0]] and rewards[0, 0] == 1
    assert seen == {**{k: v for k, v in CALL.items() if k != "columns"}, "answer": ["1", "2"]}


@pytest.mark.parametrize("values", [np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), (1, np.float32(2))])
def test_arrays_and_tensors_are_lists(values: Any) -> None:
    assert RewardRunner(lambda: values)(**CALL).tolist() == [[1.0], [2.0]]


def test_async_functions_run_together_and_on_one_loop() -> None:
    loops, running, most = [], 0, 0

    async def slow(completions: list[str], **kwargs: Any) -> list[float]:
        nonlocal running, most
        loops.append(asyncio.get_running_loop())
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return [1.0] * len(completions)

    class AsyncJudge:
        async def __call__(self, completions: list[str]) -> list[float]:
            return await slow(completions)

    runner = RewardRunner([slow, AsyncJudge(), lambda completions: [2.0, 2.0]])
    assert runner(**CALL).tolist() == [[1.0, 1.0, 2.0]] * 2
    assert runner(**CALL).tolist() == [[1.0, 1.0, 2.0]] * 2
    assert most == 2 and len(set(loops)) == 1


def test_inside_a_running_event_loop() -> None:
    async def one(completions: list[str]) -> list[float]:
        return [1.0, 1.0]

    async def notebook() -> torch.Tensor:
        return RewardRunner(one)(**CALL)

    assert asyncio.run(notebook()).tolist() == [[1.0], [1.0]]


def test_names() -> None:
    def length(weight: float, completions: list[str]) -> list[float]:
        return [weight, weight]

    class Judge:
        def __call__(self, completions: list[str]) -> list[float]:
            return [0.0, 0.0]

    runner = RewardRunner([functools.partial(length, 2.0), Judge(), functools.partial(length, 3.0)])
    assert runner.names == ["length", "Judge", "length_2"]
    assert runner(**CALL)[0].tolist() == [2.0, 0.0, 3.0]


def raising(completions: list[str]) -> list[float]:
    raise KeyError("no such answer")


async def raising_later(completions: list[str]) -> list[float]:
    raise KeyError("no such answer")


def returning(value: Any, name: str) -> Any:
    def function(completions: list[str]) -> Any:
        return value

    function.__name__ = name
    return function


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raising, r"reward function 'raising' raised KeyError: 'no such answer'"),
        (raising_later, r"reward function 'raising_later' raised KeyError: 'no such answer'"),
        (returning([1.0], "short"), r"'short' returned 1 rewards for 2 completions"),
        (returning([1.0] * 3, "long"), r"'long' returned 3 rewards for 2 completions"),
        (returning([1.0, math.nan], "nan"), r"'nan' returned nan for completion 1: expected a finite number, or None"),
        (returning([-math.inf, 1.0], "inf"), r"'inf' returned -inf for completion 0"),
        (returning(["0.5", 1.0], "text"), r"'text' returned '0.5' \(str\) for completion 0: expected a number or None"),
        (returning([[1.0], [2.0]], "nested"), r"'nested' returned \[1.0\] \(list\) for completion 0"),
        (returning(None, "nothing"), r"'nothing' returned NoneType: expected a list with one number or None"),
        (returning(1.0, "scalar"), r"'scalar' returned float: expected a list"),
        (returning(torch.tensor(1.0), "zero_dim"), r"'zero_dim' returned float: expected a list"),
        (returning({"a": 1, "b": 2}, "dict"), r"'dict' returned dict: expected a list"),
    ],
)
def test_misbehaviour_is_one_error_that_names_the_function(function: Any, message: str) -> None:
    with pytest.raises(RewardFunctionError, match=message):
        RewardRunner([lambda completions: [1.0, 1.0], function])(**CALL)


def test_the_original_exception_is_the_cause() -> None:
    with pytest.raises(RewardFunctionError) as caught:
        RewardRunner(raising)(**CALL)
    assert isinstance(caught.value.__cause__, KeyError)


def test_what_cannot_be_a_reward_function() -> None:
    with pytest.raises(ValueError, match="at least one reward function"):
        RewardRunner([])
    with pytest.raises(TypeError, match=r"reward_funcs\[1\]: reward models are not supported yet"):
        RewardRunner([raising, nn.Linear(1, 1)])
    with pytest.raises(TypeError, match=r"reward_funcs\[0\]: expected a function, got int"):
        RewardRunner([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="reward_weights: expected 1 weights, one per reward function, got 2"):
        RewardRunner(raising, [1.0, 2.0])
