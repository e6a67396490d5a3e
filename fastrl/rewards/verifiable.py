"""Rewards for answers that can be checked: reasoning-gym's verifiers, and numbers.

All have the signature that TRL's trainers call: `f(completions=..., **columns) -> list[float]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastrl.data.procedural import task_verifier
from fastrl.rewards.completions import (
    Completion,
    canonical_answer,
    completion_text,
    extracted_answer,
    last_word,
    number_value,
    stated_answer,
)


def reasoning_gym_reward(
    completions: Sequence[Completion],
    task: Sequence[str],
    task_config: Sequence[str],
    task_index: Sequence[int],
    **kwargs: Any,
) -> list[float]:
    """The task's own score in [0, 1] of the `<answer>`, or of the whole completion where no such tag is.

    Args:
        completions: B completions.
        task, task_config, task_index: columns of `fastrl.data.reasoning_gym_dataset`, B each.
    """
    rows = zip(completions, task, task_config, task_index, strict=True)
    return [
        task_verifier(name, config, index)(stated_answer(completion_text(completion)))
        for completion, name, config, index in rows
    ]


def final_answer_reward(
    completions: Sequence[Completion],
    task: Sequence[str],
    task_config: Sequence[str],
    task_index: Sequence[int],
    **kwargs: Any,
) -> list[float]:
    """1 where the task's verifier fully accepts the whole completion, 0.5 where it accepts its last word, otherwise 0.

    Teaches to answer and to say nothing else. "Fully" is a score of 1: many verifiers give partial scores for any text
    that has the answer somewhere in it.

    Args:
        completions: B completions.
        task, task_config, task_index: columns of `fastrl.data.reasoning_gym_dataset`, B each.
    """
    rewards = []
    for completion, name, config, index in zip(completions, task, task_config, task_index, strict=True):
        text, score = completion_text(completion).strip(), task_verifier(name, config, index)
        rewards.append(1.0 if score(text) >= 1.0 else 0.5 if score(last_word(text)) >= 1.0 else 0.0)
    return rewards


def exact_number_reward(completions: Sequence[Completion], answer: Sequence[str | float], **kwargs: Any) -> list[float]:
    """1 for a completion that is exactly the number, 0.5 for one whose last word is the number, otherwise 0.

    Numbers are compared by value: "07", "7.0" and "7" are equal, "1,000" equals "1000".

    Args:
        completions: B completions.
        answer: B numbers, or texts of numbers.

    Raises:
        ValueError: an entry of `answer` is not a number.
    """
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        number = number_value(str(expected))
        if number is None:
            raise ValueError(f"exact_number_reward: the column answer holds {expected!r}, which is not a number")
        text = completion_text(completion).strip()
        rewards.append(1.0 if number_value(text) == number else 0.5 if number_value(last_word(text)) == number else 0.0)
    return rewards


def extracted_answer_reward(completions: Sequence[Completion], answer: Sequence[str], **kwargs: Any) -> list[float]:
    r"""1 where the completion's answer is the one expected, otherwise 0: the last `<answer>...</answer>`, `\boxed{...}`
    or number, by the rules of `extracted_answer`, which also finds the one expected in a worked solution ("#### 72").

    Args:
        completions: B completions.
        answer: B answers, or texts that end in them.
    """
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        right = extracted_answer(str(expected)) or canonical_answer(str(expected))
        rewards.append(float(extracted_answer(completion_text(completion)) == right))
    return rewards
