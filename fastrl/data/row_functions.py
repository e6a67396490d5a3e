"""TRL's functions on rows, for `Dataset.map` in a script. Trainers do all of this themselves where it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastrl.data import formats

_CONVERSATIONS = ("messages", "prompt", "chosen", "rejected", "completion")


def is_conversational(example: Mapping[str, Any]) -> bool:
    """Whether a row's texts are lists of messages with a "role"."""
    value = next((example[name] for name in _CONVERSATIONS if name in example), None)
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def apply_chat_template(
    example: Mapping[str, Any], processing_class: PreTrainedTokenizerBase, tools: Any = None, **template_kwargs: Any
) -> dict[str, Any]:
    """A conversational row as text: "messages" become "text", other columns keep their names; only those of the format
    and "label" are kept. A prompt that ends with the user gets the generation prompt, one that ends with the assistant
    is continued; completions are what comes after it.

    Args:
        example: of one of the formats of `fastrl.data.formats`; its "chat_template_kwargs" go to the template, too.
        processing_class: the tokenizer with the template.
        tools, template_kwargs: go to the template.

    Raises:
        KeyError: no such format. ValueError: a prompt that ends with another role.
    """

    def render(messages: Any, **settings: Any) -> str:
        settings = {**(example.get("chat_template_kwargs") or {}), **template_kwargs, **settings}
        return str(processing_class.apply_chat_template(messages, tools=tools or None, tokenize=False, **settings))

    given = {name for name in (*_CONVERSATIONS, "label") if name in example}
    answers = [name for name in ("chosen", "rejected", "completion") if name in given]
    if given == {"messages"}:
        return {"text": render(example["messages"])}
    if given == {"chosen", "rejected"}:
        return {name: render(example[name]) for name in answers}
    known = ({"prompt"}, {"prompt", "completion"}, {"prompt", "completion", "label"}, {"prompt", "chosen", "rejected"})
    if given not in known:
        raise KeyError(f"the columns {sorted(given)} are no format that a chat template is applied to")
    last = example["prompt"][-1]["role"]
    if last not in ("user", "tool", "assistant"):
        raise ValueError(f"prompt: expected the user, a tool or the assistant to speak last, got {last!r}")
    continued = last == "assistant"
    prompt = render(example["prompt"], add_generation_prompt=not continued, continue_final_message=continued)
    whole = {name: render(example["prompt"] + example[name]) for name in answers}
    # Some templates render a prompt that an answer follows in another way than the prompt alone.
    prompt = prompt[: min((formats.common_prefix(prompt, text) for text in whole.values()), default=len(prompt))]
    texts: dict[str, Any] = {name: text[len(prompt) :] for name, text in whole.items()}
    labels = {"label": example["label"]} if "label" in given else {}
    return {"prompt": prompt, **texts, **labels}


def maybe_apply_chat_template(
    example: Mapping[str, Any], processing_class: PreTrainedTokenizerBase, tools: Any = None, **template_kwargs: Any
) -> Mapping[str, Any]:
    """`apply_chat_template` where the row is conversational, otherwise the row itself."""
    if not is_conversational(example):
        return example
    return apply_chat_template(example, processing_class, tools, **template_kwargs)


def extract_prompt(example: Mapping[str, Any]) -> dict[str, Any]:
    """The columns "prompt", "chosen" and "rejected" of a pair whose completions both begin with the prompt."""
    names = ("prompt", "chosen", "rejected")
    return dict(zip(names, formats.extract_prompt(example["chosen"], example["rejected"]), strict=True))


def maybe_extract_prompt(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """`extract_prompt` for a pair without a prompt of the completions' own form, otherwise the row itself."""
    if "chosen" not in example or "rejected" not in example:
        return example
    conversations = [is_conversational({"prompt": example[name]}) for name in ("prompt", "chosen") if name in example]
    return example if conversations in ([True, True], [False, False]) else extract_prompt(example)


def maybe_convert_to_chatml(example: Mapping[str, Any]) -> dict[str, Any]:
    """Messages with "role" and "content" where they had "from" and "value", in "messages" for "conversations"."""
    return formats.as_chatml(example)


def unpair_preference_dataset(dataset: Any, **map_kwargs: Any) -> Any:
    """Two rows of each pair, with "completion" and "label" (True: chosen) for "chosen" and "rejected"; within a batch
    of `map` all the chosen ones come first. Other columns are repeated.

    Args:
        dataset: a `datasets.Dataset` or `DatasetDict`.
        map_kwargs: of `Dataset.map`, such as num_proc and desc.
    """
    return dataset.map(unpaired, batched=True, remove_columns=_columns(dataset), **map_kwargs)


def maybe_unpair_preference_dataset(dataset: Any, num_proc: int | None = None, desc: str | None = None) -> Any:
    """`unpair_preference_dataset` where there are pairs, otherwise the data set itself."""
    if {"chosen", "rejected"} <= set(_columns(dataset)):
        return unpair_preference_dataset(dataset, num_proc=num_proc, desc=desc)
    return dataset


def _columns(dataset: Any) -> list[str]:
    return list((next(iter(dataset.values())) if isinstance(dataset, dict) else dataset).column_names)


def unpaired(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns of a batch of pairs as those of twice as many answers, the chosen ones first."""
    count = len(batch["chosen"])
    twice = {name: column * 2 for name, column in batch.items() if name not in ("chosen", "rejected")}
    return {**twice, "completion": batch["chosen"] + batch["rejected"], "label": [True] * count + [False] * count}
