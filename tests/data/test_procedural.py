"""Prompts from reasoning-gym: deterministic, disjoint, and scored by the task's own verifier."""

from __future__ import annotations

import pytest

from fastrl.data import TaskError, reasoning_gym_dataset, task_verifier

SUMS = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 1,
    "operators": ["+"],
    "allow_parentheses": False,
}


def additions(**arguments):
    return reasoning_gym_dataset("basic_arithmetic", prompt="What is {expression}?", task_config=SUMS, **arguments)


def test_same_arguments_same_rows_other_seed_other_rows():
    first, again, other = additions(size=20, seed=3), additions(size=20, seed=3), additions(size=20, seed=4)
    assert first["train"].to_list() == again["train"].to_list() != other["train"].to_list()


def test_splits_share_no_prompt_and_repeat_none():
    # 121 different one-digit additions exist: asking for all of them must find all of them.
    splits = additions(size=105, eval_size=16)
    prompts = [row["prompt"][0]["content"] for split in ("train", "test") for row in splits[split]]
    assert len(splits["train"]) == 105 and len(splits["test"]) == 16
    assert len(set(prompts)) == 121


def test_more_prompts_than_exist_is_an_error():
    with pytest.raises(TaskError, match="'basic_arithmetic' gave only 121 different prompts"):
        additions(size=122)


def test_the_test_split_does_not_depend_on_the_training_size():
    assert additions(size=10, eval_size=8)["test"]["prompt"] == additions(size=60, eval_size=8)["test"]["prompt"]


def test_prompt_forms():
    plain = reasoning_gym_dataset("chain_sum", size=2, conversational=False)["train"]
    assert plain[0]["prompt"].startswith("State the final answer")
    chat = reasoning_gym_dataset("chain_sum", size=2, system_prompt="Be brief.")["train"]
    assert [message["role"] for message in chat[0]["prompt"]] == ["system", "user"]
    shown = reasoning_gym_dataset("chain_sum", size=2, examples=[["1 + 1 =", "2"]])["train"][0]["prompt"]
    assert [message["role"] for message in shown] == ["user", "assistant", "user"]
    assert [message["content"] for message in shown[:2]] == ["1 + 1 =", "2"]


def test_verifier_scores_the_row_it_belongs_to():
    for row in additions(size=12)["train"]:
        expression = row["prompt"][0]["content"].removeprefix("What is ").removesuffix("?")
        left, right = expression.split(" + ")
        score = task_verifier(row["task"], row["task_config"], row["task_index"])
        assert row["answer"] == str(int(left) + int(right))
        assert score(row["answer"]) == 1.0
        assert score(str(int(row["answer"]) + 100)) < 1.0


def test_verifier_of_a_task_without_a_single_answer():
    # countdown accepts any expression that reaches the target: only its own entry can tell.
    row = reasoning_gym_dataset("countdown", size=3, seed=5)["train"][2]
    assert task_verifier(row["task"], row["task_config"], row["task_index"])(row["answer"]) == 1.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"task": "basic_aritmetic"}, "unknown reasoning-gym task 'basic_aritmetic'; did you mean 'basic_arithmetic'"),
        ({"task_config": {"min_term": 2}}, "no argument 'min_term'; did you mean 'min_terms'"),
        ({"task_config": {"min_terms": 0}}, "refuses its configuration .*min_terms must be positive"),
        ({"prompt": "What is {expresion}?"}, "'What is {expresion}\\?' does not fit .*'expression'"),
        ({"size": 0}, "size must be at least 1"),
        ({"system_prompt": "Hi", "conversational": False}, "need conversational prompts"),
        ({"examples": [["1 + 1", 2]]}, "examples: expected pairs .* got \\['1 \\+ 1', 2\\]"),
        ({"examples": ["ab"]}, "examples: expected pairs .* got 'ab'"),
    ],
    ids=["task", "argument", "value", "template", "size", "system prompt", "example", "text as example"],
)
def test_errors_name_the_thing(arguments, message):
    with pytest.raises(TaskError, match=message):
        reasoning_gym_dataset(**{"task": "basic_arithmetic", "size": 4, **arguments})
