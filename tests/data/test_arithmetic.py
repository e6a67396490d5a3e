"""Generated sums: the same problems in every format, right and wrong answers that are so, no problem in both splits."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrl.data import TaskError, arithmetic_dataset, tiny_model_path

SIZES = {"size": 300, "eval_size": 50, "operators": ["+", "-"]}


def right(prompt: str) -> int:
    return eval(prompt.rstrip("="))


def test_formats_hold_the_same_problems_and_true_answers():
    made = {form: arithmetic_dataset(form, **SIZES) for form in ("prompt-only", "prompt-completion", "preference")}
    for split, size in (("train", 300), ("test", 50)):
        prompts = made["prompt-only"][split]["prompt"]
        assert len(set(prompts)) == size
        assert all(made[form][split]["prompt"] == prompts for form in made)
        for row in made["preference"][split]:
            assert int(row["chosen"]) == int(row["answer"]) == right(row["prompt"])
            wrong = int(row["rejected"])
            assert 1 <= abs(wrong - right(row["prompt"])) <= 90
            assert (wrong >= 0) == (right(row["prompt"]) >= 0)
    data = made["prompt-only"]
    assert not set(data["train"]["prompt"]) & set(data["test"]["prompt"])
    assert {"+", "-"} <= set("".join(data["test"]["prompt"]))
    assert arithmetic_dataset("prompt-only", **SIZES, seed=1)["test"]["prompt"] != data["test"]["prompt"]
    shorter = arithmetic_dataset("prompt-only", **{**SIZES, "size": 20})
    assert shorter["test"]["prompt"] == data["test"]["prompt"]


def test_labels_of_unpaired_rows_are_true():
    rows = arithmetic_dataset("unpaired", **SIZES)["train"]
    assert all((int(row["completion"]) == right(row["prompt"])) == row["label"] for row in rows)
    assert 0.4 < sum(rows["label"]) / len(rows) < 0.6


def test_several_wrong_answers_differ():
    rows = arithmetic_dataset("preference", size=10, digits=(2, 1), operators=["-"], wrong_answers=18)["train"]
    assert len({(row["prompt"], row["rejected"]) for row in rows}) == len(rows) == 180


def test_templates_and_conversations():
    row = arithmetic_dataset(
        "preference",
        size=1,
        digits=(2, 1),
        prompt="{a:02d} plus {b}",
        completion="{answer:03d}",
        conversational=True,
        system_prompt="Add.",
        examples=[("1 plus 1", "002")],
    )["train"][0]
    assert [message["role"] for message in row["prompt"]] == ["system", "user", "assistant", "user"]
    assert len(row["prompt"][3]["content"]) == len("12 plus 3")
    assert row["chosen"] == [{"role": "assistant", "content": f"{int(row['answer']):03d}"}]


@pytest.mark.parametrize(
    "form, arguments, message",
    [
        ("preferences", {}, "did you mean 'preference'"),
        ("preference", {"digits": (4, 1)}, "digits"),
        ("preference", {"operators": ["*"]}, "operators"),
        ("preference", {"size": 0}, "size"),
        ("preference", {"size": 101, "digits": (1, 1)}, "there are only 100"),
        ("preference", {"wrong_answers": 19}, "wrong_answers"),
        ("prompt-only", {"wrong_answers": 2}, "wrong_answers"),
        ("prompt-only", {"prompt": "{c}"}, "prompt: '{c}' may use {a}, {operator}, {b}"),
        ("prompt-only", {"system_prompt": "Add."}, "conversational"),
    ],
)
def test_mistakes(form, arguments, message):
    with pytest.raises(TaskError, match=message):
        arithmetic_dataset(form, **{"size": 4, **arguments})


def test_tiny_model_reads_and_writes_sums(tmp_path):
    folder = tiny_model_path(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("27+45=072")["input_ids"]
    assert len(ids) == 9 and tokenizer.decode(ids) == "27+45=072"
    first = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in first.parameters()) < 500_000
    assert tiny_model_path(tmp_path) == folder
    again = AutoModelForCausalLM.from_pretrained(tiny_model_path(tmp_path / "other"))
    assert all((a == b).all() for a, b in zip(first.parameters(), again.parameters(), strict=True))
