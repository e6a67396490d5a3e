"""Sums and differences with right and wrong answers, as a dataset for each stage of the pipelines.

The same seed, digits and operators give the same problems in the same order in every format, so that all stages of a
pipeline keep the same problems out of training.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict

from fastrl.data.procedural import TaskError, assistant_turn, turns_before, user_turn
from fastrl.suggestions import did_you_mean

OPERATORS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub}


class Problem(NamedTuple):
    """A question; its answer, and the near misses that one might answer instead."""

    a: int
    operator: str
    b: int

    def answer(self) -> int:
        """The right one."""
        return OPERATORS[self.operator](self.a, self.b)

    def wrong_answer(self, generator: random.Random) -> int:
        """Off by one, two or ten."""
        return self.answer() + generator.choice((-10, -2, -1, 1, 2, 10))


def _preference(right: Any, wrong: Any, generator: random.Random) -> dict[str, Any]:
    return {"chosen": right, "rejected": wrong}


def _unpaired(right: Any, wrong: Any, generator: random.Random) -> dict[str, Any]:
    label = generator.random() < 0.5
    return {"completion": right if label else wrong, "label": label}


# Format -> its columns beside the prompt, from a right and a wrong completion.
FORMATS: dict[str, Callable[[Any, Any, random.Random], dict[str, Any]]] = {
    "prompt-only": lambda right, wrong, generator: {},
    "prompt-completion": lambda right, wrong, generator: {"completion": right},
    "preference": _preference,
    "unpaired": _unpaired,
}


def arithmetic_dataset(
    form: str,
    *,
    size: int,
    eval_size: int = 0,
    seed: int = 0,
    digits: int = 2,
    operators: Sequence[str] = ("+",),
    prompt: str = "{a}{operator}{b}=",
    completion: str = "{answer}",
    conversational: bool = False,
    system_prompt: str | None = None,
    examples: Sequence[Sequence[str]] = (),
) -> DatasetDict:
    """Problems such as "27+45=" in one of TRL's formats. No problem occurs twice, within a split or in both.

    Args:
        form: "prompt-only", "prompt-completion", "preference" (chosen is right) or "unpaired" (half are right).
        size, eval_size: rows of the splits "train" and "test"; there is no split "test" when `eval_size` is 0.
        seed: of the problems and the wrong answers.
        digits: of the largest number, 1 to 3.
        operators: some of "+" and "-".
        prompt: template with {a}, {operator} and {b}; "{a:02d}" has two digits always.
        completion: template with {answer}.
        conversational: prompts and completions are lists of messages if True, otherwise plain strings.
        system_prompt, examples: see `reasoning_gym_dataset` (conversational only).

    Returns:
        DatasetDict; every row also has `answer`, the number as text.

    Raises:
        TaskError: an argument out of its range, or fewer problems than asked for.
    """
    if form not in FORMATS:
        raise TaskError(f"format: expected one of {', '.join(FORMATS)}, got {form!r}{did_you_mean(form, FORMATS)}")
    if digits not in (1, 2, 3):
        raise TaskError(f"digits: expected 1, 2 or 3, got {digits!r}")
    if not operators or set(operators) - set(OPERATORS):
        raise TaskError(f"operators: expected some of {', '.join(OPERATORS)}, got {operators!r}")
    if size < 1 or eval_size < 0:
        raise TaskError(f"size must be at least 1 and eval_size at least 0, got {size} and {eval_size}")
    before = turns_before(system_prompt, examples, conversational)
    span = 10**digits
    count = span * span * len(operators)
    if size + eval_size > count:
        raise TaskError(f"size + eval_size: there are only {count} such problems, got {size + eval_size}")
    order = list(range(count))
    random.Random(seed).shuffle(order)

    def row(index: int) -> dict[str, Any]:
        pair, which = divmod(index, len(operators))
        problem = Problem(pair // span, operators[which], pair % span)
        generator = random.Random(seed * count + index)
        question = _filled("prompt", prompt, **problem._asdict())
        numbers = (problem.answer(), problem.wrong_answer(generator))
        texts = [_filled("completion", completion, answer=number) for number in numbers]
        answers: list[Any] = [[assistant_turn(text)] if conversational else text for text in texts]
        asked: Any = [*before, user_turn(question)] if conversational else question
        return {"prompt": asked, **FORMATS[form](answers[0], answers[1], generator), "answer": str(problem.answer())}

    splits = {"train": Dataset.from_list([row(index) for index in order[eval_size : eval_size + size]])}
    if eval_size:
        splits["test"] = Dataset.from_list([row(index) for index in order[:eval_size]])
    return DatasetDict(splits)


def _filled(name: str, template: str, **values: Any) -> str:
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise TaskError(
            f"{name}: {template!r} may use {', '.join(f'{{{key}}}' for key in values)} ({error})"
        ) from error
