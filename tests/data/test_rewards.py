"""Reward functions: what earns what, in both forms of completions, and how a configuration names them."""

from __future__ import annotations

import pytest

from fastrl.data import reasoning_gym_dataset
from fastrl.rewards import (
    exact_number_reward,
    final_answer_reward,
    get_reward_func,
    get_soft_overlong_punishment,
    last_word,
    reasoning_gym_reward,
    stated_answer,
    think_format_reward,
)


def columns(count):
    rows = reasoning_gym_dataset("chain_sum", size=1, seed=1, task_config={"max_terms": 2})["train"]
    return {name: [rows[0][name]] * count for name in rows.column_names if name != "prompt"}


TEXTS = {
    "{}": (1.0, 1.0),
    " {}\n": (1.0, 1.0),
    "The answer is {}.": (0.5, 0.5),
    "= **{}**": (0.5, 0.5),
    "{} is the answer": (0.0, 0.0),
    "1{}": (0.0, 0.0),
    "": (0.0, 0.0),
    "no idea": (0.0, 0.0),
}


@pytest.mark.parametrize("conversational", [False, True])
def test_exact_answer_full_last_word_half(conversational):
    given = columns(len(TEXTS))
    texts = [text.format(given["answer"][0]) for text in TEXTS]
    completions = [[{"role": "assistant", "content": text}] if conversational else text for text in texts]
    numbers = exact_number_reward(completions=completions, prompts=None, **given)
    verified = final_answer_reward(completions=completions, prompts=None, **given)
    assert numbers == [expected for expected, _ in TEXTS.values()]
    assert verified == [expected for _, expected in TEXTS.values()]


def test_numbers_compare_by_value():
    completions = ["07", "7.0", "1,000", "1e3", "nan", "Infinity", "-7"]
    answers = ["7", 7, "1000", "1000", "7", "7", "7"]
    assert exact_number_reward(completions=completions, answer=answers) == [1, 1, 1, 1, 0, 0, 0]


def test_an_answer_column_without_numbers_is_an_error():
    with pytest.raises(ValueError, match="column answer holds 'Paris'"):
        exact_number_reward(completions=["7"], answer=["Paris"])


def test_reasoning_gym_score_reads_the_answer_tag():
    given = columns(3)
    answer = given["answer"][0]
    completions = [f"because <answer> {answer} </answer>", answer, "<answer>x</answer>"]
    assert reasoning_gym_reward(completions=completions, **given) == [1.0, 1.0, 0.0]


def test_stated_answer_and_last_word():
    assert stated_answer("<answer>1</answer> no, <answer>\n2 </answer>") == "2"
    assert [last_word(text) for text in ("so it is **7**.", "", " . ", "(a) b")] == ["7", "", "", "b"]


def test_form_rewards():
    texts = ["<think>a</think>b", "b", "<think>a<think>b</think>c", " <think>a</think>b"]
    assert think_format_reward(completions=texts) == [1, 0, 0, 0]
    overlong = get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4)
    assert overlong(completion_ids=[[0] * n for n in (0, 6, 8, 10, 12)]) == [0, 0, -0.5, -1, -1]
    with pytest.raises(ValueError, match="between 1 and max_completion_len"):
        get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=11)


def test_reward_names(tmp_path, monkeypatch):
    assert get_reward_func("final_answer_reward") is final_answer_reward
    (tmp_path / "my_rewards_module.py").write_text("def short(completions, **kw):\n    return [1.0]\nlevel = 3\n")
    monkeypatch.chdir(tmp_path)
    assert get_reward_func("my_rewards_module.short")(completions=["a"]) == [1.0]
    for name, message in {
        "final_anser_reward": "unknown reward function .*did you mean 'final_answer_reward'",
        "my_rewards_module.long": "can't be imported",
        "no_such_module.f": "can't be imported: No module named 'no_such_module'",
        "my_rewards_module.level": "is not callable but a int",
    }.items():
        with pytest.raises(ValueError, match=message):
            get_reward_func(name)
