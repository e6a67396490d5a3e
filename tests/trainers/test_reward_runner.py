"""Reward functions: how they are called, one clear error for each way in which they can misbehave, and what a function
that raises or hangs costs."""

import asyncio
import functools
import math
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastrl.rewards import calls
from fastrl.trainers.reward_runner import RewardFunctionError, RewardRunner

CALL: dict[str, Any] = {
    "prompts": ["p", "p"],
    "completions": ["x", "y z"],
    "completion_ids": [[1], [2, 3]],
    "columns": {"answer": ["1", "2"]},
    "trainer_state": "state",
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
    assert callable(seen.pop("log_metric")) and callable(seen.pop("log_extra"))
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
        (returning([1.0], "short"), r"'short' returned 1 rewards for 2 completions"),
        (returning([1.0] * 3, "long"), r"'long' returned 3 rewards for 2 completions"),
        (returning([1.0, math.nan], "nan"), r"'nan' returned nan for completion 1: expected a finite number, or None"),
        (returning([-math.inf, 1.0], "inf"), r"'inf' returned -inf for completion 0"),
        (returning([1.0, 1e39], "beyond_fp32"), r"'beyond_fp32' returned 1e\+39 for completion 1"),
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


def test_a_column_that_is_missing_and_a_package_that_is_missing_are_errors_at_once() -> None:
    def graded(completions: list[str], solution: list[str]) -> list[float]:
        return [1.0, 1.0]

    def needs_package(completions: list[str]) -> list[float]:
        raise ImportError("pip install judge")

    with pytest.raises(RewardFunctionError, match="'graded' needs the column 'solution', which the dataset does not"):
        RewardRunner(graded)(**CALL)
    with pytest.raises(RewardFunctionError, match="'needs_package' raised ImportError: pip install judge"):
        RewardRunner(needs_package)(**CALL)


# What failures cost

LIMITS = [{}, {"timeout": 5.0, "workers": 2}]


@pytest.mark.parametrize("limits", LIMITS, ids=["in turn", "in threads"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_exception_costs_the_reward_of_its_completion_only(limits: dict[str, Any], asynchronous: bool) -> None:
    def grade(completions: list[str], answer: list[str], log_metric: Any, log_extra: Any) -> list[float]:
        log_metric("seen", len(completions))
        log_extra("upper", [c.upper() for c in completions])
        if "y z" in completions:
            raise KeyError("y z")
        return [float(a) for a in answer]

    async def grade_later(completions: list[str], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return grade(completions, kwargs["answer"], kwargs["log_metric"], kwargs["log_extra"])

    def other(completions: list[str]) -> list[float]:
        return [5.0] * len(completions)

    metrics: list[tuple[str, float]] = []
    columns: dict[str, list[Any]] = {}
    runner = RewardRunner([grade_later if asynchronous else grade, other], **limits)
    name = runner.names[0]
    logs = {"log_metric": lambda *metric: metrics.append(metric), "log_extra": columns.__setitem__}
    rewards = runner(**CALL, **logs)
    assert rewards[:, 1].tolist() == [5.0, 5.0] and rewards[0, 0] == 1.0 and math.isnan(rewards[1, 0])
    assert metrics == [(f"rewards/{name}/errors", 1.0), (f"rewards/{name}/timeouts", 0.0), ("seen", 1.0)]
    assert columns == {"upper": ["X", None]}
    metrics.clear()
    runner(**{**CALL, "completions": ["x", "y"]}, **logs)  # from the first failure on, none is a number, too
    assert metrics == [(f"rewards/{name}/errors", 0.0), (f"rewards/{name}/timeouts", 0.0), ("seen", 2.0)]


@pytest.mark.parametrize("limits", LIMITS, ids=["in turn", "in threads"])
@pytest.mark.parametrize("function", [raising, raising_later])
def test_a_function_that_always_fails_ends_the_run_after_some_batches(
    function: Any, limits: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    runner = RewardRunner([function, lambda completions: [1.0, 1.0]], max_failed_batches=3, **limits)
    for _ in range(2):
        assert runner(**CALL).isnan().tolist() == [[True, False]] * 2
    with pytest.raises(
        RewardFunctionError, match=f"'{function.__name__}' raised KeyError.* 3 batches in a row"
    ) as caught:
        runner(**CALL)
    assert isinstance(caught.value.__cause__, KeyError)
    shown = caplog.text
    assert shown.count("Traceback") == 1 and 'raise KeyError("no such answer")' in shown
    assert "it failed for 2 of 2; such completions get no reward" in shown


def test_a_batch_that_works_starts_the_count_anew() -> None:
    works = iter([False, True, False, False])

    def moody(completions: list[str]) -> list[float]:
        if not state:
            raise OSError("busy")
        return [1.0] * len(completions)

    runner = RewardRunner(moody, max_failed_batches=2)
    for _ in range(3):
        state = next(works)
        assert runner(**CALL).isnan().any() == (not state)
    state = next(works)
    with pytest.raises(RewardFunctionError, match="2 batches in a row"):
        runner(**CALL)


def hang(seconds: float = 30.0) -> None:
    threading.Event().wait(seconds)


@pytest.mark.parametrize("kind", ["sync", "async", "async that blocks its loop"])
def test_a_call_that_hangs_costs_the_reward_of_its_completion_only(kind: str) -> None:
    cancelled = threading.Event()

    def sync(completions: list[str]) -> list[float]:
        if "y z" in completions:
            hang()
        return [2.0] * len(completions)

    async def later(completions: list[str]) -> list[float]:
        try:
            if "y z" in completions:
                await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return [2.0] * len(completions)

    async def blocking(completions: list[str]) -> list[float]:
        return sync(completions)

    function = {"sync": sync, "async": later, "async that blocks its loop": blocking}[kind]
    metrics: dict[str, float] = {}
    start = time.monotonic()
    rewards = RewardRunner(function, timeout=0.3)(**CALL, log_metric=metrics.__setitem__)
    assert time.monotonic() - start < 10
    assert rewards[0].tolist() == [2.0] and math.isnan(rewards[1, 0])
    assert metrics == {f"rewards/{function.__name__}/errors": 0.0, f"rewards/{function.__name__}/timeouts": 1.0}
    assert kind != "async" or cancelled.wait(5)


def test_functions_run_in_parallel_under_a_limit_up_to_the_number_of_workers() -> None:
    barrier = threading.Barrier(2)
    running, most = 0, 0

    def meets(completions: list[str]) -> list[float]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        barrier.wait(timeout=10)
        running -= 1
        return [1.0] * len(completions)

    assert RewardRunner([meets] * 4, timeout=30.0, workers=2)(**CALL).tolist() == [[1.0] * 4] * 2
    assert most == 2


def test_a_slow_function_without_a_limit_is_mentioned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastrl.rewards.calls._PATIENCE", 0.05)

    def slow(completions: list[str]) -> list[float]:
        hang(0.5)
        return [1.0, 1.0]

    assert RewardRunner(slow)(**CALL).tolist() == [[1.0], [1.0]]
    shown = caplog.text
    assert "reward functions slow: no result" in shown and "reward_timeout" in shown


def test_without_a_limit_functions_run_in_the_calling_thread() -> None:
    threads = []

    def where(completions: list[str]) -> list[float]:
        threads.append(threading.current_thread())
        return [1.0, 1.0]

    RewardRunner(where)(**CALL)
    RewardRunner(where, timeout=5.0)(**CALL)
    assert threads[0] is threading.current_thread() and threads[1] is not threads[0]


@pytest.mark.parametrize("limits", LIMITS, ids=["in turn", "in threads"])
def test_an_interrupt_is_not_an_exception_of_a_function(limits: dict[str, Any]) -> None:
    def interrupted(completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    after = []
    with pytest.raises(KeyboardInterrupt):
        RewardRunner([interrupted, lambda completions: after.append(1) or [1.0, 1.0]], **limits)(**CALL)
    assert limits or not after  # in turn, nothing more is called

    async def leaves(completions: list[str]) -> list[float]:
        raise SystemExit

    with pytest.raises(SystemExit):
        RewardRunner(leaves, **limits)(**CALL)


def test_a_call_that_hangs_does_not_hold_up_the_end_of_the_process() -> None:
    code = """
import asyncio, importlib.util, sys, threading
spec = importlib.util.spec_from_file_location("calls", sys.argv[1])  # without the rest of the package: seconds less
calls = importlib.util.module_from_spec(spec)
spec.loader.exec_module(calls)
async def hangs():
    threading.Event().wait()
print(calls.CallRunner(0.2, 2).run([threading.Event().wait, hangs], "both"))
"""
    done = subprocess.run([sys.executable, "-c", code, calls.__file__], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.count("CallTimeoutError") == 2, done.stderr


def test_what_cannot_be_a_reward_function() -> None:
    with pytest.raises(ValueError, match="at least one reward function"):
        RewardRunner([])
    with pytest.raises(TypeError, match=r"reward_funcs\[1\]: .* passed as fastrl.rewards.RewardModel"):
        RewardRunner([raising, nn.Linear(1, 1)])
    with pytest.raises(TypeError, match=r"reward_funcs\[0\]: expected a function, got int"):
        RewardRunner([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="reward_weights: expected 1 weights, one per reward function, got 2"):
        RewardRunner(raising, [1.0, 2.0])
    with pytest.raises(ValueError, match="reward_timeout: expected a positive number of seconds, or None, got 0"):
        RewardRunner(raising, timeout=0)
    with pytest.raises(ValueError, match="reward_workers: expected at least 1, got 0"):
        RewardRunner(raising, timeout=1, workers=0)
    with pytest.raises(ValueError, match="max_failed_reward_batches: expected at least 1, got 0"):
        RewardRunner(raising, max_failed_batches=0)
