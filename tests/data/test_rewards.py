"""Reward functions: what earns what, in both forms of completions, and how a configuration names them."""

from __future__ import annotations

import threading
import time

import pytest

from fastrl.data import reasoning_gym_dataset
from fastrl.rewards import (
    accuracy_reward,
    boxed_answer,
    exact_number_reward,
    extracted_answer,
    extracted_answer_reward,
    final_answer_reward,
    get_cosine_scaled_reward,
    get_length_penalty_reward,
    get_repetition_penalty_reward,
    get_reward_func,
    get_soft_overlong_punishment,
    last_word,
    math_answers,
    reasoning_accuracy_reward,
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
    step = get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=0)
    assert step(completion_ids=[[0] * n for n in (0, 10, 11)]) == [0, 0, -1]
    with pytest.raises(ValueError, match="between 0 and max_completion_len"):
        get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=11)
    length = get_length_penalty_reward(max_len=10, max_penalty=-2.0)
    assert length(completion_ids=[[0] * n for n in (0, 5, 10, 20)]) == [0, -1, -2, -2]
    repetition = get_repetition_penalty_reward(ngram_size=2)
    assert repetition(completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5], [1], []]) == [0, -0.75, 0, 0]
    for make in (lambda: get_length_penalty_reward(0), lambda: get_repetition_penalty_reward(max_penalty=1.0)):
        with pytest.raises(ValueError, match="positive"):
            make()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{3}}.", r"\frac{1}{3}"),
        (r"\boxed{3}, no, \boxed{4", "3"),  # the last one was cut off
        (r"<answer>\boxed{7}</answer> or 8", "7"),
        ("<answer> **Paris**. </answer>", "paris"),
        ("it is 1,000.", "1000"),
        ("1e3", "1000"),
        ("1, 2, 3.50", "3.5"),
        ("1,2", "2"),
        ("x = -7", "-7"),
        ("10-7", "7"),
        ("-0.0", "0"),
        ("2/6", "2/6"),
        ("no idea", None),
        ("<answer></answer> 3", None),
        ("", None),
    ],
)
def test_extracted_answer(text, answer):
    assert extracted_answer(text) == answer


def test_extracted_answer_reward():
    given = {
        "so it is 72.": "6 * 12 = <<6*12=72>>72\n#### 72",
        "<answer>The Seine</answer>": "the seine",
        r"\boxed{1,000}": "1000",
        "73": "72",
        "no idea": "72",
    }
    assert extracted_answer_reward(completions=list(given), answer=list(given.values())) == [1, 1, 1, 0, 0]


def test_boxed_answer_of_many_open_braces_is_found_quickly():
    start = time.monotonic()
    assert boxed_answer(r"\boxed{1}" + r"\boxed{" * 1000) == "1"
    assert time.monotonic() - start < 5


# math-verify

SOLUTIONS = [r"\frac{1}{3}"] * 4 + ["$63$", "3 meters", "not a number"]
ANSWERS = [
    r"My answer is \boxed{\frac{1}{3}}",
    r"My answer is \boxed{\frac{1}{2}}",
    r"It is \boxed{\frac{2}{6}}",
    "one third",
    r"<think> \boxed{1} </think> so \\boxed{63}",
    r"</think> \boxed{3 \text{ meters}}",
    r"</think> \boxed{1}",
]


def test_math_accuracy_compares_values():
    extra = {}
    assert accuracy_reward(ANSWERS, SOLUTIONS, log_extra=extra.__setitem__) == [1, 0, 1, 0, 1, 1, None]
    assert extra["solution"] == SOLUTIONS and extra["gold_parsed"][-1] == "[unparseable]"
    assert extra["answer_parsed"][3] == "[unparseable]" and extra["answer_parsed"][-1] == "[skipped]"
    assert reasoning_accuracy_reward(ANSWERS, SOLUTIONS) == [0, 0, 0, 0, 1, 1, None]
    assert reasoning_accuracy_reward([r"a END 1 END \boxed{2}"], ["2"], reasoning_delimiters=["</think>", "END"]) == [1]
    cosine = get_cosine_scaled_reward(max_len=100)
    lengths = [[0] * n for n in (0, 50, 100, 0, 100, 200, 5)]
    assert cosine(ANSWERS, SOLUTIONS, lengths) == pytest.approx([1.0, -0.75, 0.5, -1.0, 0.5, 0.5, None])


def test_math_rewards_are_trls():
    rewards = pytest.importorskip("trl.rewards")
    completions = [[{"role": "assistant", "content": text}] for text in ANSWERS]
    ids = [[1] * n for n in (0, 30, 50, 70, 100, 150, 5)]
    assert accuracy_reward(completions, SOLUTIONS) == rewards.accuracy_reward(completions, SOLUTIONS)
    assert reasoning_accuracy_reward(completions, SOLUTIONS) == rewards.reasoning_accuracy_reward(
        completions, SOLUTIONS
    )
    given = {"completions": completions, "solution": SOLUTIONS, "completion_ids": ids}
    assert get_cosine_scaled_reward(100)(**given) == pytest.approx(rewards.get_cosine_scaled_reward(100)(**given))
    repeats = [[1, 2, 1, 2, 1, 2, 3], [5] * 9, [1, 2]]
    assert get_repetition_penalty_reward()(repeats) == pytest.approx(rewards.get_repetition_penalty_reward()(repeats))


def test_an_answer_that_takes_too_long_is_wrong_and_the_next_one_is_graded(monkeypatch):
    monkeypatch.setattr(math_answers, "_GRADE_SECONDS", 1.5)
    rewards = []

    def grade():  # not the main thread: math-verify's own limits do not work here
        answers = [r"\boxed{3}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{3}"]
        rewards.extend(accuracy_reward(answers, ["3"] * 3))

    thread = threading.Thread(target=grade)
    start = time.monotonic()
    thread.start()
    thread.join()
    assert rewards == [1, 0, 1]
    assert time.monotonic() - start < 60


def test_without_math_verify_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(math_answers, "_grade", math_answers._Grader())
    monkeypatch.setattr(math_answers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install 'math-verify"):
        accuracy_reward(["1"], ["1"])


def test_reward_names(tmp_path, monkeypatch):
    assert get_reward_func("final_answer_reward") is final_answer_reward
    (tmp_path / "my_rewards_module.py").write_text("def short(completions, **kw):\n    return [1.0]\nlevel = 3\n")
    monkeypatch.chdir(tmp_path)
    assert get_reward_func("my_rewards_module.short")(completions=["a"]) == [1.0]
    assert get_reward_func("get_length_penalty_reward(max_len=4)")(completion_ids=[[0]]) == [-0.25]
    for name, message in {
        "final_anser_reward": "unknown reward function .*did you mean 'final_answer_reward'",
        "my_rewards_module.long": "can't be imported",
        "no_such_module.f": "can't be imported: No module named 'no_such_module'",
        "my_rewards_module.level": "is not callable but a int",
        "get_length_penalty_reward": r"needs arguments, as key=value: get_length_penalty_reward\(max_len: ",
        "get_length_penalty_reward(256)": r"expected name\(key=value",
        "get_length_penalty_reward(max_len=x)": "malformed",
        "get_length_penalty_reward(max_len=0)": "max_len: expected a positive number",
        "get_length_penalty_reward(len=3)": "unexpected keyword",
        "get_length_penalty_reward(": "was never closed",
    }.items():
        with pytest.raises(ValueError, match=message):
            get_reward_func(name)
