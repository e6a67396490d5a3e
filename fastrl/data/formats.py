"""TRL's dataset formats, standard and conversational, to token ids: one row at a time, as TRL 1.16's trainers do it.

| Format | Columns |
|---|---|
| language modelling | "text", or "messages" (also "conversations" with "from" and "value") |
| prompt-completion | "prompt", "completion" |
| preference | "prompt", "chosen", "rejected"; or the last two, each beginning with the prompt; optional "margin" |
| K-ranked | "prompt", "completions": K of them, best first, or with "ranks" (1 is best) or "scores" (high is best) |
| unpaired | "prompt", "completion", "label" (bool) |
| stepwise | "prompt", "completions" (the steps), "labels" (one bool per step) |

A standard prompt or completion is a string, a conversational one a list of messages with "role" and "content". Columns
"tools" and "chat_template_kwargs" go to the chat template. Prompt-only rows are `fastrl.trainers.prompts`' subject.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

Row = Mapping[str, Any]

_MESSAGE_COLUMNS = ("prompt", "completion", "chosen", "rejected", "reference", "messages", "conversations")


class FormatError(ValueError):
    """A row that is not in the format it should be in; the message does not name the row."""


class Text(NamedTuple):
    """A sequence, and which of its tokens a loss counts."""

    ids: list[int]
    counted: list[bool]

    def split(self, size: int | None) -> list[Text]:
        """Pieces of `size` tokens, the last one shorter; None: one piece."""
        size = size or max(len(self.ids), 1)
        starts = range(0, len(self.ids), size)
        return [Text(self.ids[start : start + size], self.counted[start : start + size]) for start in starts]


class Completions(NamedTuple):
    """A prompt and one or several completions of it, in token ids."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]

    def texts(self) -> list[Text]:
        """Each completion after the prompt; the completion's tokens count."""
        prompt = len(self.prompt_ids)
        return [Text(self.prompt_ids + ids, [False] * prompt + [True] * len(ids)) for ids in self.completion_ids]


class TokenSequence(NamedTuple):
    """What a model is trained on: the tokens before the first that counts, those from there on, and which count."""

    prompt_ids: list[int]
    completion_ids: list[int]
    loss_mask: list[bool]


def sequence_of(text: Text) -> TokenSequence:
    """Cut before the first token that counts. The first token of all is never predicted, so it does not count."""
    first = next((i for i, counts in enumerate(text.counted) if counts and i), len(text.ids))
    return TokenSequence(text.ids[:first], text.ids[first:], text.counted[first:])


def truncated(text: Text, max_length: int | None, mode: str = "keep_start") -> Text:
    """At most `max_length` tokens, the first (`keep_start`) or the last (`keep_end`) of them."""
    if max_length is None or len(text.ids) <= max_length:
        return text
    kept = slice(None, max_length) if mode == "keep_start" else slice(-max_length, None)
    return Text(text.ids[kept], text.counted[kept])


def is_conversation(value: Any) -> bool:
    """Whether it is a list of messages; a string is not.

    Raises:
        FormatError: neither.
    """
    if isinstance(value, str):
        return False
    if isinstance(value, Sequence) and value and all(isinstance(m, Mapping) and "role" in m for m in value):
        return True
    shown = repr(value)
    raise FormatError(
        f"expected a string or a list of messages with 'role' and 'content', got {type(value).__name__} "
        f"{shown if len(shown) <= 60 else shown[:57] + '...'}"
    )


def as_chatml(row: Row) -> dict[str, Any]:
    """The row with messages of "role" and "content" where it had "from" and "value", and "messages" for
    "conversations"."""
    names = {"from": "role", "value": "content"}
    new = dict(row)
    for column in _MESSAGE_COLUMNS:
        messages = new.get(column)
        if isinstance(messages, list) and messages and isinstance(messages[0], Mapping) and "from" in messages[0]:
            new[column] = [{names.get(key, key): value for key, value in message.items()} for message in messages]
    if "conversations" in new:
        new["messages"] = new.pop("conversations")
    return new


def columns_of(row: Row, *names: str) -> tuple[Any, ...]:
    """The values of columns.

    Raises:
        FormatError: one is not there, or None.
    """
    missing = [name for name in names if row.get(name) is None]
    if missing:
        raise FormatError(f"no {', '.join(map(repr, missing))}; it has {_names(row)}")
    return tuple(row[name] for name in names)


def pair_of(row: Row) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) of a preference row. The prompt may be implicit: what both completions begin with."""
    chosen, rejected = columns_of(row, "chosen", "rejected")
    prompt = row.get("prompt")
    if prompt is None or is_conversation(prompt) != is_conversation(chosen):
        is_conversation(rejected)
        return extract_prompt(chosen, rejected)
    return prompt, chosen, rejected


def extract_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected): the beginning that two texts or conversations share is the prompt.

    As TRL's `extract_prompt`: a blank at the end of a shared text goes to the completions.

    Raises:
        FormatError: one of them is empty.
    """
    shortest = min(len(chosen), len(rejected))
    if not shortest:
        raise FormatError("'chosen' and 'rejected' must not be empty")
    index = next((i for i in range(shortest) if chosen[i] != rejected[i]), None)
    if index is None:
        index = shortest - 1
    elif index and chosen[index - 1] == " ":
        index -= 1
    return chosen[:index], chosen[index:], rejected[index:]


@dataclass(frozen=True)
class Encoder:
    """Rows to token ids with one tokenizer; each method takes a row of the format that it is named after.

    Strings get the tokenizer's own special tokens, and a completion the end-of-sequence token unless it has one.
    Conversations go through the chat template, prompts with a generation prompt.

    Args:
        tokenizer: with a chat template if there are conversations.
        chat_template: instead of the tokenizer's own.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None

    # Formats ---------------------------------------------------------------------------------------------------------

    def language_modeling(self, row: Row, text_field: str = "text", assistant_only: bool = False) -> Text:
        """All tokens count, or those that the chat template marks as the assistant's."""
        row = as_chatml(row)
        if row.get("messages") is not None:
            return self._conversation(row["messages"], row, assistant_only)
        if row.get(text_field) is None:
            raise FormatError(f"no column {text_field!r} (dataset_text_field) or 'messages'; it has {_names(row)}")
        if is_conversation(row[text_field]):
            return self._conversation(row[text_field], row, assistant_only)
        if assistant_only:
            raise FormatError("assistant_only_loss: only for conversations, got a string")
        ids = self.encode(self.with_eos(row[text_field]), row)
        return Text(ids, [True] * len(ids))

    def prompt_completion(self, row: Row, completion_only: bool = True, assistant_only: bool = False) -> Text:
        """The completion's tokens count, or all; of them only the assistant's, if asked."""
        row = as_chatml(row)
        prompt, completion = columns_of(row, "prompt", "completion")
        (text,) = self.completions(prompt, [completion], row).texts()
        if not completion_only:
            text = Text(text.ids, [True] * len(text.ids))
        if not assistant_only:
            return text
        if not is_conversation(prompt):
            raise FormatError("assistant_only_loss: only for conversations, got a string")
        marked = self._conversation([*prompt, *completion], row, assistant_only)
        return Text(text.ids, [a and b for a, b in zip(text.counted, marked.counted, strict=True)])

    def preference(self, row: Row, gold: bool = False) -> Completions:
        """Two completions: the chosen and the rejected one; with `gold` a third, of column "reference" (TPO). The
        prompt may be implicit."""
        row = as_chatml(row)
        prompt, chosen, rejected = pair_of(row)
        answers = [chosen, rejected]
        if gold:
            (reference,) = columns_of(row, "reference")
            start = 0 if prompt == row.get("prompt") else len(prompt)
            if start and reference[:start] != prompt:
                raise FormatError("'reference' does not begin with the prompt that 'chosen' and 'rejected' share")
            answers.append(reference[start:])
        return self.completions(prompt, answers, row)

    def ranked(self, row: Row) -> tuple[Completions, list[float]]:
        """K >= 2 completions and their ranks: smaller is better, only the order means anything, ties are allowed."""
        prompt, completions = columns_of(row, "prompt", "completions")
        count = len(completions)
        if count < 2:
            raise FormatError(f"'completions': expected at least two, got {count}")
        if row.get("ranks") is not None:
            ranks = [float(rank) for rank in row["ranks"]]
        elif row.get("scores") is not None:
            ranks = [-float(score) for score in row["scores"]]
        else:
            ranks = [float(place) for place in range(1, count + 1)]
        if len(ranks) != count:
            raise FormatError(f"{len(ranks)} ranks or scores for {count} completions")
        return self.completions(prompt, completions, row), ranks

    def unpaired(self, row: Row) -> tuple[Completions, bool]:
        """One completion and whether it is a good one."""
        row = as_chatml(row)
        prompt, completion, label = columns_of(row, "prompt", "completion", "label")
        return self.completions(prompt, [completion], row), _truth(label)

    def stepwise(
        self, row: Row, step_separator: str = "\n", last_step_only: bool = False
    ) -> tuple[Completions, list[int]]:
        """One completion, the steps with a separator after each, and per token its step's label at the step's end, -100
        elsewhere. As TRL's `PRMTrainer` had it: each step is tokenized apart, the prompt gets a BOS token."""
        prompt, steps, labels = columns_of(row, "prompt", "completions", "labels")
        if len(steps) != len(labels) or not len(steps):
            raise FormatError(f"{len(labels)} labels for {len(steps)} steps ('completions')")
        separator = self._plain(step_separator)
        if is_conversation(prompt):
            prompt_ids = self.encode(prompt, row, add_generation_prompt=True)
        else:
            prompt_ids = self._plain(prompt)
            if self.tokenizer.bos_token_id is not None:
                prompt_ids = [self.tokenizer.bos_token_id, *prompt_ids]
        ids, marks = [], []
        for place, (step, label) in enumerate(zip(steps, labels, strict=True), 1):
            tokens = self._plain(step) + separator
            if not tokens:
                raise FormatError(f"step {place} has no tokens")
            counts = place == len(steps) or not last_step_only
            ids += tokens
            marks += [-100] * (len(tokens) - 1) + [_class(label) if counts else -100]
        return Completions(prompt_ids, [ids]), marks

    # What they are made of -------------------------------------------------------------------------------------------

    def completions(self, prompt: Any, completions: Sequence[Any], row: Row) -> Completions:
        """A prompt and completions of it, tokenized together and cut apart where all of them still agree with the
        prompt tokenized alone, which is not always at its end: tokens merge, and templates differ."""
        conversational = is_conversation(prompt) if prompt else is_conversation(completions[0])
        fits = conversational or isinstance(prompt, str)
        if not fits or any(is_conversation(completion) != conversational for completion in completions):
            raise FormatError("the prompt and its completions must be all strings or all conversations")
        if conversational:
            prompt, completions = list(prompt), [[*prompt, *completion] for completion in completions]
        else:
            completions = [prompt + self.with_eos(completion) for completion in completions]
        prompt_ids = [] if prompt == [] else self.encode(prompt, row, add_generation_prompt=True)
        whole = [self.encode(completion, row) for completion in completions]
        shared = min(common_prefix(prompt_ids, ids) for ids in whole)
        if shared < len(prompt_ids):
            logger.warning_once(
                "A tokenized prompt is not the beginning of the tokenized prompt and completion: tokens merge across "
                "the boundary, or the chat template renders the prompt alone differently. The completion starts where "
                "they differ, so the model is trained on a context that differs from the one it sees when it samples. "
                "End prompts on a token's boundary, or use a template that renders them alike."
            )
        return Completions(whole[0][:shared], [ids[shared:] for ids in whole])

    def encode(self, value: Any, row: Row, **template: Any) -> list[int]:
        """Token ids of a string or of a conversation; `template` goes to the chat template."""
        if isinstance(value, str):
            return list(self.tokenizer(text=value)["input_ids"])
        return list(self._apply_template(value, row, **template)["input_ids"])

    def with_eos(self, text: str) -> str:
        """The text, ending with the tokenizer's end-of-sequence token where it has one."""
        eos = self.tokenizer.eos_token
        return text if eos is None or text.endswith(eos) else text + eos

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text=text, add_special_tokens=False)["input_ids"])

    def _conversation(self, messages: Any, row: Row, assistant_only: bool) -> Text:
        is_conversation(messages)
        if not assistant_only:
            ids = self.encode(messages, row)
            return Text(ids, [True] * len(ids))
        encoded = self._apply_template(messages, row, return_assistant_tokens_mask=True)
        marked = [bool(mark) for mark in encoded["assistant_masks"]]
        if not any(marked):
            raise FormatError(
                "assistant_only_loss: the chat template marks no token of this conversation as the assistant's; put "
                "what the assistant says, its end-of-turn token included, between {% generation %} and "
                "{% endgeneration %} in the template, or set chat_template_path to one that does"
            )
        return Text(list(encoded["input_ids"]), marked)

    def _apply_template(self, messages: Any, row: Row, **template: Any) -> Any:
        if self.chat_template is None and self.tokenizer.chat_template is None:
            raise FormatError(
                "the row is a conversation, but the tokenizer has no chat template; set tokenizer.chat_template, or "
                "chat_template_path where the trainer has it"
            )
        tools = row.get("tools")
        return self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=True,
            return_dict=True,
            chat_template=self.chat_template,
            tools=(json.loads(tools) if isinstance(tools, str) else tools) or None,
            **(row.get("chat_template_kwargs") or {}),
            **template,
        )


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _names(row: Row) -> str:
    return ", ".join(repr(name) for name, value in row.items() if value is not None)


def _truth(label: Any) -> bool:
    if isinstance(label, str) or label not in (0, 1):  # bool("False") is True
        raise FormatError(f"a label is {label!r}: expected True or False, or 1 or 0")
    return bool(label)


def _class(label: Any) -> int:
    # NumPy's integers and floats are Real, its bool is not.
    if not isinstance(label, Real | np.bool_) or not float(label).is_integer():
        raise FormatError(f"a label is {label!r}: expected True or False, or the number of a class")
    return int(float(label))
