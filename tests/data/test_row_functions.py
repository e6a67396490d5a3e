"""TRL's functions on rows: what they make of each format, and that it is what TRL makes of it."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import fastrl

USER = [{"role": "user", "content": "sky?"}]
BLUE, RED = ([{"role": "assistant", "content": color}] for color in ("blue", "red"))
HALF = [*USER, {"role": "assistant", "content": "It is"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if not loop.last or not continue_final_message %};"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% if think %}<think>{% endif %}{% endif %}"
)
# Row -> its text.
TEXTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"messages": USER + BLUE}, {"text": "<user>sky?;<assistant>blue;"}),
    ({"prompt": USER, "solution": 3}, {"prompt": "<user>sky?;<assistant>"}),
    ({"prompt": HALF}, {"prompt": "<user>sky?;<assistant>It is"}),
    ({"prompt": USER, "completion": BLUE}, {"prompt": "<user>sky?;<assistant>", "completion": "blue;"}),
    (
        {"prompt": USER, "completion": BLUE, "label": False},
        {"prompt": "<user>sky?;<assistant>", "completion": "blue;", "label": False},
    ),
    (
        {"prompt": USER, "chosen": BLUE, "rejected": RED},
        {"prompt": "<user>sky?;<assistant>", "chosen": "blue;", "rejected": "red;"},
    ),
    (
        {"chosen": USER + BLUE, "rejected": USER + RED},
        {"chosen": "<user>sky?;<assistant>blue;", "rejected": "<user>sky?;<assistant>red;"},
    ),
    # The template opens a thought that the answer does not have.
    (
        {"prompt": USER, "completion": BLUE, "chat_template_kwargs": {"think": True}},
        {"prompt": "<user>sky?;<assistant>", "completion": "blue;"},
    ),
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Only its template is used."""
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE)


@pytest.mark.parametrize("row, text", TEXTS)
def test_conversations_as_text(row: dict[str, Any], text: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    assert fastrl.is_conversational(row)
    assert fastrl.maybe_apply_chat_template(row, tokenizer) == text
    assert fastrl.maybe_apply_chat_template(text, tokenizer) is text and not fastrl.is_conversational(text)
    if importlib.util.find_spec("trl"):
        import trl

        assert trl.maybe_apply_chat_template(row, tokenizer) == text


def test_rows_that_no_template_is_for(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(KeyError, match="no format"):
        fastrl.apply_chat_template({"prompt": USER, "chosen": BLUE}, tokenizer)
    with pytest.raises(ValueError, match="got 'system'"):
        fastrl.apply_chat_template({"prompt": [{"role": "system", "content": "be kind"}]}, tokenizer)


def test_implicit_prompts() -> None:
    pair = {"chosen": USER + BLUE, "rejected": USER + RED}
    explicit = {"prompt": USER, "chosen": BLUE, "rejected": RED}
    assert fastrl.extract_prompt(pair) == explicit == fastrl.maybe_extract_prompt(pair)
    assert fastrl.maybe_extract_prompt({**pair, "prompt": "sky?"}) == explicit
    assert fastrl.maybe_extract_prompt(explicit) is explicit
    assert fastrl.maybe_extract_prompt({"text": "x"}) == {"text": "x"}
    standard = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert fastrl.extract_prompt(standard) == {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    assert Dataset.from_list([pair]).map(fastrl.extract_prompt)[0] == explicit


def test_pairs_as_single_answers() -> None:
    pairs = [{"prompt": p, "chosen": f"{p}+", "rejected": f"{p}-", "source": p} for p in ("a", "b")]
    dataset = Dataset.from_list(pairs)
    single = fastrl.unpair_preference_dataset(dataset)
    assert [(row["prompt"], row["completion"], row["label"], row["source"]) for row in single] == [
        ("a", "a+", True, "a"),
        ("b", "b+", True, "b"),
        ("a", "a-", False, "a"),
        ("b", "b-", False, "b"),
    ]
    assert fastrl.maybe_unpair_preference_dataset(single) is single
    splits = fastrl.maybe_unpair_preference_dataset(DatasetDict(test=dataset), desc="unpairing")
    assert splits["test"].to_list() == single.to_list()


def test_other_names_of_messages() -> None:
    row = {"conversations": [{"from": "user", "value": "sky?"}]}
    assert fastrl.maybe_convert_to_chatml(row) == {"messages": USER}
