"""Prompts from reasoning-gym's procedural generators as a `datasets.DatasetDict`, and their verifiers.

A row does not carry reasoning-gym's entry but what re-creates it (task, configuration, index): entries hold tuples,
sets and integer keys, which no table format keeps, and some verifiers depend on them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

REASONING_GYM_INSTALL = "pip install reasoning-gym"


class TaskError(ValueError):
    """A reasoning-gym task can't be built as asked; the message names the task and the wrong argument."""


def reasoning_gym_dataset(
    task: str,
    *,
    size: int,
    eval_size: int = 0,
    seed: int = 0,
    prompt: str = "{question}",
    system_prompt: str | None = None,
    examples: Sequence[Sequence[str]] = (),
    conversational: bool = True,
    task_config: Mapping[str, Any] | None = None,
) -> DatasetDict:
    """Prompts with verifiable answers: the same arguments give the same rows on every machine.

    No prompt occurs twice, neither within a split nor in both: the first `eval_size` different prompts of the generator
    are the test split, the next `size` the training split.

    Args:
        task: name of a reasoning-gym dataset, for example "chain_sum".
        size, eval_size: rows of the splits "train" and "test"; there is no split "test" when `eval_size` is 0.
        seed: seed of the generator.
        prompt: template of the user's message, with `{question}`, `{answer}` or a field of the item's metadata, for
            example "What is {expression}?".
        system_prompt: content of a system message before it (conversational only).
        examples: pairs of a user's message and the assistant's answer that come before it (conversational only): they
            show the form of an answer, and are the same for every row.
        conversational: prompt is a list of messages if True, otherwise a plain string.
        task_config: arguments of the generator except seed and size, for example {"max_terms": 2}.

    Returns:
        DatasetDict whose rows hold `prompt`, `answer` (the verifier's reference), and `task`, `task_config` (JSON) and
        `task_index`, from which `task_verifier` finds the entry again.

    Raises:
        TaskError: unknown task, argument or template field, or fewer different prompts than asked for.
        ImportError: reasoning-gym is not installed.
    """
    if size < 1 or eval_size < 0:
        raise TaskError(f"size must be at least 1 and eval_size at least 0, got {size} and {eval_size}")
    before = turns_before(system_prompt, examples, conversational)
    wanted = size + eval_size
    # The generator's own size is only a bound on the index. Small tasks repeat themselves: finding the last few of n
    # different prompts takes about n log n draws.
    draws = 50 * wanted + 10_000
    config = json.dumps({**(task_config or {}), "seed": seed, "size": draws}, sort_keys=True)
    generator = _generator(task, config)

    rows: dict[str, dict[str, Any]] = {}
    for index in range(draws):
        entry = generator[index]
        text = _fill(prompt, entry, task)
        if text not in rows:
            rows[text] = {"answer": str(entry["answer"]), "task": task, "task_config": config, "task_index": index}
            if len(rows) == wanted:
                break
    if len(rows) < wanted:
        raise TaskError(
            f"reasoning-gym task {task!r} gave only {len(rows)} different prompts in {draws} draws, "
            f"but size + eval_size is {wanted}"
        )

    table = [{"prompt": [*before, user_turn(text)] if conversational else text, **row} for text, row in rows.items()]
    splits = {"train": Dataset.from_list(table[eval_size:])}
    if eval_size:
        splits["test"] = Dataset.from_list(table[:eval_size])
    return DatasetDict(splits)


def turns_before(
    system_prompt: str | None, examples: Sequence[Sequence[str]], conversational: bool
) -> list[dict[str, str]]:
    """What comes before a question: a system message, and worked examples as pairs of question and answer.

    Raises:
        TaskError: there are some, but prompts are not conversational; or an example is not a pair of texts.
    """
    if (system_prompt is not None or examples) and not conversational:
        raise TaskError("system_prompt and examples need conversational prompts")
    for example in examples:
        if isinstance(example, str) or len(example) != 2 or not all(isinstance(text, str) for text in example):
            raise TaskError(f"examples: expected pairs of a question and its answer as text, got {example!r}")
    before = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    for question, answer in examples:
        before += [user_turn(question), assistant_turn(answer)]
    return before


def user_turn(text: str) -> dict[str, str]:
    """A message."""
    return {"role": "user", "content": text}


def assistant_turn(text: str) -> dict[str, str]:
    """A message."""
    return {"role": "assistant", "content": text}


def task_verifier(task: str, task_config: str, task_index: int) -> Callable[[str], float]:
    """The verifier of one row of `reasoning_gym_dataset`: answer -> score in [0, 1], by the task's own `score_answer`.

    Raises:
        TaskError: unknown task or configuration.
        ImportError: reasoning-gym is not installed.
    """
    generator, entry = _entry(task, task_config, task_index)
    return lambda answer: float(generator.score_answer(answer, entry))


@functools.lru_cache(maxsize=4096)
def _entry(task: str, config: str, index: int) -> tuple[ProceduralDataset, dict[str, Any]]:
    generator = _generator(task, config)
    return generator, generator[index]


@functools.lru_cache(maxsize=64)
def _generator(task: str, config: str) -> ProceduralDataset:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ModuleNotFoundError as error:
        raise ImportError(f"reasoning-gym prompts need {error.name}; get it with: {REASONING_GYM_INSTALL}") from error

    from fastrl.suggestions import did_you_mean

    if task not in DATASETS:
        raise TaskError(f"unknown reasoning-gym task {task!r}{did_you_mean(task, DATASETS)}")
    arguments = json.loads(config)
    known = DATASETS[task][1].__dataclass_fields__
    for name in arguments:
        if name not in known:
            raise TaskError(f"reasoning-gym task {task!r} has no argument {name!r}{did_you_mean(name, known)}")
    try:
        return create_dataset(task, **arguments)
    except (AssertionError, TypeError, ValueError) as error:  # its configurations are validated by assert
        raise TaskError(f"reasoning-gym task {task!r} refuses its configuration {config}: {error}") from error


def _fill(template: str, entry: Mapping[str, Any], task: str) -> str:
    fields = {**entry.get("metadata", {}), "question": entry["question"], "answer": entry["answer"]}
    try:
        return template.format_map(fields)
    except (KeyError, IndexError, ValueError) as error:
        raise TaskError(
            f"prompt template {template!r} does not fit the task {task!r} ({error}); it may use {sorted(fields)}"
        ) from error
