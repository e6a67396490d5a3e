"""Rewards for mathematical answers, compared by value with math-verify. Names, arguments and values as in TRL.

Unlike TRL's, they work in any thread and can't hang: see `fastrl.rewards.math_worker`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastrl.rewards.completions import Completion, completion_text

MATH_VERIFY_INSTALL = "pip install 'math-verify[antlr4_13_2]'"
_START_SECONDS, _GRADE_SECONDS = 120.0, 30.0  # math-verify's own limits add up to 25 s

LogExtra = Callable[[str, list[Any]], None]


class Grade(NamedTuple):
    """A graded answer: reward 1 or 0, or None where the solution can't be parsed, and both as they were understood."""

    reward: float | None
    gold: str
    answer: str


def accuracy_reward(
    completions: Sequence[Completion], solution: Sequence[str], log_extra: LogExtra | None = None, **kwargs: Any
) -> list[float | None]:
    r"""1 where the answer (LaTeX such as `\boxed{\frac{1}{3}}`) equals the solution, otherwise 0; None where the
    solution can't be parsed. An answer that takes more than 30 s to check counts as wrong.

    Args:
        completions: B completions.
        solution: B texts with the right answers.
        log_extra: gets the columns solution, gold_parsed and answer_parsed.

    Raises:
        ImportError: math-verify is not installed.
    """
    grades = [_grade(gold, completion_text(c)) for c, gold in zip(completions, solution, strict=True)]
    return _logged(grades, solution, log_extra)


def reasoning_accuracy_reward(
    completions: Sequence[Completion],
    solution: Sequence[str],
    reasoning_delimiters: Sequence[str] | None = None,
    log_extra: LogExtra | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """`accuracy_reward` of what follows the reasoning; 0 where the reasoning does not end.

    Args:
        completions: B completions.
        solution: B texts with the right answers.
        reasoning_delimiters: what ends the reasoning: the first of them that occurs counts, at its last place. None:
            "</think>".
        log_extra: gets the columns solution, gold_parsed and answer_parsed.

    Raises:
        ImportError: math-verify is not installed.
    """
    grades = []
    for completion, gold in zip(completions, solution, strict=True):
        text = completion_text(completion)
        end = next((mark for mark in reasoning_delimiters or ["</think>"] if mark in text), None)
        if end is None:
            grades.append(Grade(0.0, "[incomplete reasoning]", "[incomplete reasoning]"))
        else:
            grades.append(_grade(gold, text.rpartition(end)[2]))
    return _logged(grades, solution, log_extra)


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable[..., list[float | None]]:
    """`accuracy_reward` scaled by length along half a cosine: https://arxiv.org/abs/2502.03373, appendix C.1.

    From n = 0 to n = `max_len` tokens (and beyond) a correct completion goes from max_value_correct to
    min_value_correct, a wrong one from min_value_wrong to max_value_wrong.

    Raises:
        ValueError: max_len is not positive.
    """
    if max_len < 1:
        raise ValueError(f"max_len: expected a positive number of tokens, got {max_len}")

    def cosine_scaled_reward(
        completions: Sequence[Completion],
        solution: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **kwargs: Any,
    ) -> list[float | None]:
        """completions, solution and completion_ids: B each."""
        rewards: list[float | None] = []
        for correct, ids in zip(accuracy_reward(completions, solution), completion_ids, strict=True):
            if correct is None:
                rewards.append(None)
                continue
            at_zero, at_end = (max_value_correct, min_value_correct) if correct else (min_value_wrong, max_value_wrong)
            share = (1.0 + math.cos(min(len(ids) / max_len, 1.0) * math.pi)) / 2.0
            rewards.append(at_end + (at_zero - at_end) * share)
        return rewards

    return cosine_scaled_reward


def _logged(grades: Sequence[Grade], solution: Sequence[str], log_extra: LogExtra | None) -> list[float | None]:
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("gold_parsed", [grade.gold for grade in grades])
        log_extra("answer_parsed", [grade.answer for grade in grades])
    return [grade.reward for grade in grades]


class _Grader:
    """The process that grades, started when it is first needed, again where it had to be killed or after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def __call__(self, gold: str, answer: str) -> Grade:
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._process, self._owner = _start(), os.getpid()
            reply = _ask(self._process, json.dumps({"gold": gold, "answer": answer}), _GRADE_SECONDS)
            if reply is None:
                self._process.kill()
                self._process.wait()
                self._process = None
        return Grade(0.0, "[not known]", "[took too long]") if reply is None else Grade(**json.loads(reply))


def _start() -> subprocess.Popen[str]:
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError(f"rewards for mathematical answers need math-verify; get it with: {MATH_VERIFY_INSTALL}")
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("math_worker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # Ctrl-C is for the run; the end of its input ends the worker
    )
    if _ask(process, None, _START_SECONDS) is None:
        raise RuntimeError("math-verify's process did not start; its output is above")
    return process


def _ask(process: subprocess.Popen[str], line: str | None, seconds: float) -> str | None:
    """The process's next line, after `line` was written to it; None if it ended, or took longer and was killed."""
    assert process.stdin is not None and process.stdout is not None
    limit = threading.Timer(seconds, process.kill)
    limit.daemon = True
    limit.start()
    try:
        if line is not None:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        return process.stdout.readline() or None
    except BrokenPipeError:
        return None
    finally:
        limit.cancel()


_grade = _Grader()
