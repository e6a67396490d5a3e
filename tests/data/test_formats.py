"""Dataset formats to token ids: what TRL 1.16's own trainers make of the same rows, and what only fastrl has."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastrl.data.formats import (
    Encoder,
    FormatError,
    Text,
    as_chatml,
    extract_prompt,
    sequence_of,
    truncated,
)
from fastrl.data.packed_rows import best_fit_decreasing
from fastrl.data.token_rows import token_row, tokenize_rows

TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}<|end|>{% endif %}{% if note %}{{ note }}{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def bpe(bos: bool, eos: bool = True, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Merges across the boundary of "hel" and "lo world"; with `bos`, every text begins with <s>."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|tools|>", "<|end|>"]
    corpus = ["hello world, the sky is blue and not green"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(corpus, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", **({"eos_token": "</s>"} if eos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


WEATHER = {"type": "function", "function": {"name": "weather", "description": "It is sunny.", "parameters": {}}}
SINGLE: dict[str, dict[str, Any]] = {
    "text": {"text": "the sky is blue"},
    "text_with_eos": {"text": "the sky is blue</s>"},
    "messages": {"messages": [user("hello"), assistant("world"), user("the sky?"), assistant("blue")]},
    "from_value": {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "the sky"}]},
    "tools": {"messages": [user("hi"), assistant("ok")], "tools": [WEATHER]},
    "tools_json": {"messages": [user("hi"), assistant("ok")], "tools": '[{"name": "f"}]'},
    "template_arguments": {"messages": [user("hi"), assistant("ok")], "chat_template_kwargs": {"note": "green"}},
    "pair": {"prompt": "the sky is", "completion": " blue"},
    "merging_pair": {"prompt": "hel", "completion": "lo world"},
    "empty_prompt": {"prompt": "", "completion": "the sky"},
    "chat_pair": {"prompt": [user("the sky is")], "completion": [assistant("blue")]},
    "long_chat_pair": {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]},
}
PREFERENCE: dict[str, dict[str, Any]] = {
    "explicit": {"prompt": "the sky is", "chosen": " blue", "rejected": " green"},
    "merging": {"prompt": "hel", "chosen": "lo world", "rejected": "d"},
    "implicit": {"chosen": "the sky is blue", "rejected": "the sky is green"},
    "nothing_shared": {"chosen": "a b", "rejected": "c d"},
    "one_within_the_other": {"chosen": "the sky", "rejected": "the sky is"},
    "chat": {"prompt": [user("hello")], "chosen": [assistant("blue")], "rejected": [assistant("green and blue")]},
    "implicit_chat": {
        "chosen": [user("hello"), assistant("blue")],
        "rejected": [user("hello"), assistant("green")],
    },
    "chat_with_tools": {
        "prompt": [user("q")],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
        "tools": [WEATHER],
    },
}


MODES = [
    *[("auto", bos, case) for bos in (False, True) for case in SINGLE],
    *[("whole", True, case) for case in SINGLE if "prompt" in SINGLE[case]],
    *[("assistant", True, case) for case in SINGLE if not isinstance(next(iter(SINGLE[case].values())), str)],
    *[(keep, True, case) for keep in ("keep_start", "keep_end") for case in ("messages", "pair", "long_chat_pair")],
]


@pytest.mark.parametrize("mode, bos, case", MODES)
def test_as_trl_prepares_sft(case: str, bos: bool, mode: str) -> None:
    trl = pytest.importorskip("trl")
    row, tokenizer = SINGLE[case], bpe(bos)
    completion_only = "prompt" in row and mode != "whole"
    args = SimpleNamespace(
        dataset_num_proc=None, dataset_text_field="text", assistant_only_loss=mode == "assistant",
        shuffle_dataset=False, max_length=6 if mode.startswith("keep") else None, truncation_mode=mode,
    )  # fmt: skip
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=completion_only)
    prepared = trl.SFTTrainer._prepare_dataset(trainer, Dataset.from_list([row]), tokenizer, args, False, None, "train")
    encoder = Encoder(tokenizer)
    if "prompt" in row:
        text = encoder.prompt_completion(row, completion_only, mode == "assistant")
    else:
        text = encoder.language_modeling(row, "text", mode == "assistant")
    text = truncated(text, args.max_length, mode)
    if not len(prepared):
        assert not any(text.counted)
        return
    assert text.ids == prepared[0]["input_ids"]
    assert text.counted == [label != -100 for label in prepared[0]["labels"]]


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("case", PREFERENCE)
def test_as_trl_prepares_preferences(case: str, bos: bool) -> None:
    trl = pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    row, tokenizer = PREFERENCE[case], bpe(bos)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    ours = Encoder(tokenizer).preference(row)
    dpo = trl.DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list([row]), tokenizer, args, "train"
    )[0]
    assert [ours.prompt_ids, *ours.completion_ids] == [dpo["prompt_ids"], dpo["chosen_ids"], dpo["rejected_ids"]]
    reward = trl.RewardTrainer._prepare_dataset(SimpleNamespace(), Dataset.from_list([row]), tokenizer, args, "train")[
        0
    ]
    assert [text.ids for text in ours.texts()] == [reward["chosen_ids"], reward["rejected_ids"]]
    for mode in ("keep_start", "keep_end"):
        cut = DataCollatorForPreference(pad_token_id=0, max_length=5, truncation_mode=mode)([dpo])
        for number, text in enumerate(truncated(text, 5, mode) for text in ours.texts()):
            inside = cut["attention_mask"][number].bool()
            assert text.ids == cut["input_ids"][number][inside].tolist()
            assert text.counted == cut["completion_mask"][number][inside].bool().tolist()


@pytest.mark.parametrize("case", ["pair", "merging_pair", "chat_pair", "empty_prompt"])
def test_as_trl_prepares_unpaired(case: str) -> None:
    trl = pytest.importorskip("trl")
    row, tokenizer = {**SINGLE[case], "label": True}, bpe(True)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None)
    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False)
    theirs = trl.trainer.kto_trainer.KTOTrainer._prepare_dataset(
        trainer, Dataset.from_list([row]), tokenizer, args, "eval"
    )[0]
    ours, label = Encoder(tokenizer).unpaired(row)
    assert label is True
    assert [ours.prompt_ids, *ours.completion_ids] == [theirs["prompt_ids"], theirs["completion_ids"]]


PAIRS = [("the sky is blue", "the sky is green"), ("ab", "ab"), ("a b", "a c"), ("a", "b"), (" a", " b"), ("abc", "ab")]


@pytest.mark.parametrize("chosen, rejected", PAIRS)
def test_extracted_prompts_are_trls(chosen: str, rejected: str) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    theirs = data_utils.extract_prompt({"chosen": chosen, "rejected": rejected})
    assert extract_prompt(chosen, rejected) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


def test_a_prompt_beside_conversations_that_contain_it() -> None:
    row = {"prompt": "hello", "chosen": [user("hello"), assistant("a")], "rejected": [user("hello"), assistant("b")]}
    without = {name: row[name] for name in ("chosen", "rejected")}
    assert Encoder(bpe(False)).preference(row) == Encoder(bpe(False)).preference(without)


def test_chatml_is_trls() -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    row = {"conversations": [{"from": "user", "value": "hi"}], "chosen": [{"role": "user", "content": "x"}]}
    assert as_chatml(row) == data_utils.maybe_convert_to_chatml({k: [dict(m) for m in v] for k, v in row.items()})
    assert row["conversations"][0] == {"from": "user", "value": "hi"}  # the row is left alone


# What only fastrl has, or TRL no longer has --------------------------------------------------------------------------


def test_ranked() -> None:
    encoder = Encoder(bpe(False))
    row: dict[str, Any] = {"prompt": "the sky is", "completions": [" blue", " green", " not"]}
    completions, ranks = encoder.ranked(row)
    assert ranks == [1.0, 2.0, 3.0]
    assert encoder.ranked({**row, "ranks": [2, 1, 2]})[1] == [2.0, 1.0, 2.0]
    assert encoder.ranked({**row, "scores": [0.5, -1.0, 3.0]})[1] == [-0.5, 1.0, -3.0]
    for text, completion in zip(completions.texts(), row["completions"], strict=True):
        pair = encoder.prompt_completion({"prompt": row["prompt"], "completion": completion})
        assert text == pair
    chat = {"prompt": [user("x")], "completions": [[assistant("a")], [assistant("b")]]}
    assert len(encoder.ranked(chat)[0].completion_ids) == 2
    for wrong, message in (
        ({"completions": [" blue"]}, "expected at least two, got 1"),
        ({"ranks": [1, 2]}, "2 ranks or scores for 3 completions"),
        ({"completions": [" blue", [assistant("green")]]}, "must be all strings or all conversations"),
    ):
        with pytest.raises(FormatError, match=message):
            encoder.ranked({**row, **wrong})


@pytest.mark.parametrize("label", [True, 1, 1.0, np.bool_(True), np.int64(1), np.float32(1)], ids=repr)
def test_labels_of_answers(label: Any) -> None:
    row, encoder = {"prompt": "the sky is", "completion": " blue"}, Encoder(bpe(False))
    assert encoder.unpaired({**row, "label": label})[1] is True
    assert encoder.unpaired({**row, "label": label * 0})[1] is False
    for wrong in (str(label), "", label + 2, label / 2, math.nan, [label], []):
        with pytest.raises(FormatError, match=r"a label is .*: expected True or False, or 1 or 0"):
            encoder.unpaired({**row, "label": wrong})


def test_stepwise() -> None:
    """As TRL's PRMTrainer documented it: the label of a step lies on the separator after it."""
    encoder = Encoder(bpe(False))
    row = {"prompt": "hello", "completions": ["the sky", "blue"], "labels": [True, False]}
    (prompt, (ids,)), marks = encoder.stepwise(row)
    tokenizer = encoder.tokenizer
    assert tokenizer.decode(prompt) == "<s>hello" and tokenizer.decode(ids) == "the sky\nblue\n"
    ends = [i for i, mark in enumerate(marks) if mark != -100]
    assert [tokenizer.decode(ids[: end + 1]) for end in ends] == ["the sky\n", "the sky\nblue\n"]
    assert [marks[end] for end in ends] == [1, 0] and len(marks) == len(ids)
    assert [m for m in encoder.stepwise(row, last_step_only=True)[1] if m != -100] == [0]
    classes = encoder.stepwise({**row, "labels": [2, 0.0]})[1]  # of a model with three
    assert [mark for mark in classes if mark != -100] == [2, 0]
    for labels in ([np.int64(2), np.bool_(False)], np.array([2.0, 0.0], dtype=np.float32)):  # as rows of pandas have
        assert encoder.stepwise({**row, "labels": labels})[1] == classes
    for label in ("True", "", 0.5, math.nan, math.inf, [1], None, np.float64(0.5)):
        with pytest.raises(FormatError, match=r"a label is .*: expected True or False, or the number of a class"):
            encoder.stepwise({**row, "labels": [True, label]})
    with pytest.raises(FormatError, match=r"1 labels for 2 steps"):
        encoder.stepwise({**row, "labels": [True]})
    with pytest.raises(FormatError, match="no 'labels'; it has 'prompt', 'completions'"):
        encoder.stepwise({"prompt": "a", "completions": ["b"]})


def test_without_an_eos_token_nothing_is_appended() -> None:
    tokenizer = bpe(False, eos=False)
    ids = Encoder(tokenizer).language_modeling({"text": "the sky"}).ids
    assert tokenizer.decode(ids) == "the sky"
    assert tokenizer.decode(Encoder(bpe(False)).language_modeling({"text": "the sky"}).ids) == "the sky</s>"


def test_sequences_begin_with_a_token_that_is_not_predicted() -> None:
    assert sequence_of(Text([5, 6, 7], [True, True, False])) == ([5], [6, 7], [True, False])
    assert sequence_of(Text([5, 6, 7], [False, False, True])) == ([5, 6], [7], [True])
    assert sequence_of(Text([5, 6], [False, False])) == ([5, 6], [], [])
    assert sequence_of(Text([5], [True])) == ([5], [], [])
    assert Text([1, 2, 3], [True] * 3).split(2) == [Text([1, 2], [True] * 2), Text([3], [True])]


# Whole datasets ------------------------------------------------------------------------------------------------------


def one_text(row: Any) -> Any:
    return token_row([sequence_of(truncated(Encoder(bpe(False)).language_modeling(row), 4))])


def test_lists_and_datasets_give_the_same_rows() -> None:
    rows = [{"text": "the sky is blue"}, {"text": ""}, {"text": "hello"}]  # the second is a single token
    made = [tokenize_rows(kind, "train_dataset", one_text) for kind in (rows, Dataset.from_list(rows))]
    assert [made[0][i] for i in range(len(made[0]))] == [made[1][i] for i in range(len(made[1]))]
    assert [row["longest"] for row in made[0].rows] == [4, 2]


def test_errors_name_the_argument_and_the_row() -> None:
    for kind in (list, Dataset.from_list):
        with pytest.raises(ValueError, match="eval_dataset: row 1: no column 'text'"):
            tokenize_rows(kind([{"text": "a"}, {"text": None}]), "eval_dataset", one_text)
    with pytest.raises(TypeError, match="x: row 0: expected a dict, got str"):
        tokenize_rows(["a"], "x", one_text)
    with pytest.raises(TypeError, match=r"x: expected a datasets.Dataset or a list of rows, got dict"):
        tokenize_rows({"text": ["a"]}, "x", one_text)
    with pytest.raises(ValueError, match="x: row 0: 4 tokens are more than the model's context of 3; set max_length"):
        tokenize_rows([{"text": "the sky is blue"}], "x", one_text, context_length=3)
    with pytest.raises(ValueError, match="row 0: the row is a conversation, but the tokenizer has no chat template"):
        tokenize_rows(
            [{"messages": [user("a")]}], "x", lambda row: Encoder(bpe(False, template=None)).language_modeling(row)
        )


def test_best_fit_decreasing_is_trls() -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    lengths = [5, 3, 8, 2, 7, 1, 4, 4, 6, 2, 3, 5, 8, 1]
    bins = best_fit_decreasing(lengths, 8)
    assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in items) <= 8 for items in bins)
    theirs = data_utils.pack_dataset(Dataset.from_dict({"input_ids": [[i] * n for i, n in enumerate(lengths)]}), 8)
    assert sorted(sorted(lengths[i] for i in items) for items in bins) == sorted(
        sorted(lengths) for lengths in theirs["seq_lengths"]
    )
    with pytest.raises(ValueError, match="a sequence of 9 tokens does not fit into a block of 8"):
        best_fit_decreasing([9], 8)
