"""Sums and differences with right and wrong answers, as a dataset for each stage of the pipelines.

The same seed, digits and operators give the same problems in the same order in every format, so that all stages of a
pipeline keep the same problems out of training.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict

from fastrl.data.procedural import TaskError, assistant_turn, turns_before, user_turn
from fastrl.suggestions import did_you_mean

OPERATORS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub}

# Of wrong answers: in the last digit, or in the one before it.
ERRORS = tuple(sign * size for size in (*range(1, 10), *range(10, 100, 10)) for sign in (1, -1))
MOST_WRONG = 18  # of them leave the sign of every answer as it is


class Problem(NamedTuple):
    """A question; its answer, and what one might answer instead."""

    a: int
    operator: str
    b: int

    def answer(self) -> int:
        """The right one."""
        return OPERATORS[self.operator](self.a, self.b)

    def wrong_answers(self, count: int, generator: random.Random) -> list[int]:
        """Different ones of the right sign, with an error in one digit but for the carry."""
        answer = self.answer()
        errors = [error for error in ERRORS if (answer + error >= 0) == (answer >= 0)]
        return [answer + error for error in generator.sample(errors, count)]


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
    digits: Sequence[int] = (2, 2),
    operators: Sequence[str] = ("+",),
    prompt: str = "{a}{operator}{b}=",
    completion: str = "{answer}",
    wrong_answers: int = 1,
    conversational: bool = False,
    system_prompt: str | None = None,
    examples: Sequence[Sequence[str]] = (),
) -> DatasetDict:
    """Problems such as "27+45=" in one of TRL's formats. No problem occurs twice, within a split or in both.

    Args:
        form: "prompt-only", "prompt-completion", "preference" (chosen is right) or "unpaired" (half are right).
        size, eval_size: problems of the splits "train" and "test"; there is no split "test" when `eval_size` is 0.
        seed: of the problems and the wrong answers.
        digits: of the first and the second number at most, 1 to 3 each.
        operators: some of "+" and "-".
        prompt: template with {a}, {operator} and {b}; "{a:02d}" has two digits always.
        completion: template with {answer}.
        wrong_answers: rows per problem in "preference", each with another wrong answer, 18 at most.
        conversational: prompts and completions are lists of messages if True, otherwise plain strings.
        system_prompt, examples: see `reasoning_gym_dataset` (conversational only).

    Returns:
        DatasetDict; every row also has `answer`, the number as text.

    Raises:
        TaskError: an argument out of its range, or fewer problems than asked for.
    """
    if form not in FORMATS:
        raise TaskError(f"format: expected one of {', '.join(FORMATS)}, got {form!r}{did_you_mean(form, FORMATS)}")
    if len(digits) != 2 or set(digits) - {1, 2, 3}:
        raise TaskError(f"digits: expected 1, 2 or 3 for each of the two numbers, got {digits!r}")
    if not operators or set(operators) - set(OPERATORS):
        raise TaskError(f"operators: expected some of {', '.join(OPERATORS)}, got {operators!r}")
    if not 1 <= wrong_answers <= MOST_WRONG or (wrong_answers > 1 and form != "preference"):
        raise TaskError(f"wrong_answers: expected 1, in a preference dataset up to {MOST_WRONG}, got {wrong_answers}")
    if size < 1 or eval_size < 0:
        raise TaskError(f"size must be at least 1 and eval_size at least 0, got {size} and {eval_size}")
    before = turns_before(system_prompt, examples, conversational)
    span = 10 ** digits[1]
    count = 10 ** digits[0] * span * len(operators)
    if size + eval_size > count:
        raise TaskError(f"size + eval_size: there are only {count} such problems, got {size + eval_size}")
    order = list(range(count))
    random.Random(seed).shuffle(order)

    def rows(index: int) -> Iterator[dict[str, Any]]:
        pair, which = divmod(index, len(operators))
        problem = Problem(pair // span, operators[which], pair % span)
        generator = random.Random(seed * count + index)
        question = _filled("prompt", prompt, **problem._asdict())
        asked: Any = [*before, user_turn(question)] if conversational else question
        right, *wrong = (
            [assistant_turn(text)] if conversational else text
            for text in (
                _filled("completion", completion, answer=number)
                for number in (problem.answer(), *problem.wrong_answers(wrong_answers, generator))
            )
        )
        for answer in wrong:
            yield {"prompt": asked, **FORMATS[form](right, answer, generator), "answer": str(problem.answer())}

    def split(problems: Sequence[int]) -> Dataset:
        return Dataset.from_list([row for index in problems for row in rows(index)])

    splits = {"train": split(order[eval_size : eval_size + size])}
    if eval_size:
        splits["test"] = split(order[:eval_size])
    return DatasetDict(splits)


def _filled(name: str, template: str, **values: Any) -> str:
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise TaskError(
            f"{name}: {template!r} may use {', '.join(f'{{{key}}}' for key in values)} ({error})"
        ) from error
