"""From the rows of a dataset to token ids, and from sampled ids back to what reward functions see.

A prompt is a string, or a conversation: a list of messages with "role" and "content"."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from datasets import IterableDataset as StreamedDataset
from torch.utils.data import Dataset, IterableDataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from fastrl.data.token_rows import advice_on_empty

logger = logging.get_logger(__name__)


class Example(NamedTuple):
    """A row and its place in the dataset, which error messages name."""

    position: int
    row: dict[str, Any]


class PromptDataset(Dataset[Example]):
    """A map-style dataset of rows with a "prompt", checked.

    Args:
        rows: a `datasets.Dataset`, a list of dicts, or anything with `__len__` and `__getitem__` that gives dicts.
        name: the argument it came as, for error messages.
        only_prompt: drop the other columns.

    Raises:
        TypeError: a streamed dataset, or something that is not indexable.
        ValueError: no rows, no "prompt" column, or a first prompt of a wrong type.
    """

    def __init__(self, rows: Any, name: str, only_prompt: bool = False) -> None:
        if isinstance(rows, StreamedDataset | IterableDataset):
            raise TypeError(f"{name}: streamed (iterable) datasets are not supported yet, pass a datasets.Dataset")
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise TypeError(f"{name}: expected a datasets.Dataset or a list of rows, got {type(rows).__name__}")
        if len(rows) == 0:
            raise ValueError(f"{name}: the dataset is empty{advice_on_empty(name)}")
        self.rows, self.name, self.only_prompt = rows, name, only_prompt
        first = rows[0]
        columns = getattr(rows, "column_names", None) or (list(first) if isinstance(first, Mapping) else None)
        if columns is None:
            raise TypeError(f"{name}: expected rows that are dicts, got {type(first).__name__}")
        if "prompt" not in columns:
            raise ValueError(f"{name}: no column 'prompt'; it has {', '.join(map(repr, columns))}")
        is_conversation(self[0], name)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        if not isinstance(row, Mapping):
            raise TypeError(f"{self.name}: row {index}: expected a dict, got {type(row).__name__}")
        return Example(index, {"prompt": row["prompt"]} if self.only_prompt else dict(row))


def is_conversation(example: Example, name: str) -> bool:
    """Whether a prompt is a conversation.

    Raises:
        ValueError: it is neither a string nor a conversation; the message names the row.
    """
    prompt = example.row.get("prompt")
    if isinstance(prompt, str):
        return False
    messages = isinstance(prompt, Sequence) and len(prompt) > 0
    if messages and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in prompt):  # type: ignore[union-attr]
        return True
    shown = repr(prompt)
    raise ValueError(
        f"{name}: the prompt of row {example.position} is {type(prompt).__name__} "
        f"{shown if len(shown) <= 60 else shown[:57] + '...'}; expected a string, or a list of messages with 'role' "
        "and 'content'"
    )


def with_prompts(rows: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> Any:
    """A dataset of token ids ("input_ids") as one of prompts: the texts that the tokenizer makes those ids of.

    Any other dataset is returned as it is.

    Raises:
        ValueError: ids that their own text does not give back; the message names the row.
    """
    columns = getattr(rows, "column_names", None) or ()
    if "input_ids" not in columns or "prompt" in columns:
        return rows

    def texts(batch: Mapping[str, Any], positions: Sequence[int]) -> dict[str, list[str]]:
        prompts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        again = tokenizer(text=prompts)["input_ids"]
        for position, ids, new in zip(positions, batch["input_ids"], again, strict=True):
            if list(ids) != list(new):
                raise ValueError(
                    f"{name}: the input_ids of row {position} are not those of their text ({list(ids)[:8]}..., "
                    f"{list(new)[:8]}...): give a column 'prompt' with text, and no padding"
                )
        return {"prompt": prompts}

    return rows.map(texts, batched=True, with_indices=True, remove_columns=list(columns))


def split_conversations(rows: Any) -> Any:
    """A dataset of "messages" (or a dict of such) as one of "prompt" and "completion": the last message is the latter.

    Any other dataset is returned as it is.
    """
    if isinstance(rows, dict):
        return {name: split_conversations(part) for name, part in rows.items()}

    def split(row: Mapping[str, Any]) -> dict[str, Any]:
        return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}

    columns = getattr(rows, "column_names", None) or (list(rows[0]) if isinstance(rows, list) and rows else [])
    if "messages" not in columns or "prompt" in columns:
        return rows
    if isinstance(rows, list):
        return [split(row) for row in rows]
    return rows.map(split, remove_columns=["messages"])


def tokenize_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    chat_template_kwargs: Mapping[str, Any],
    context_length: int | None,
) -> tuple[list[list[int]], bool]:
    """Token ids of each prompt, and whether they are conversations.

    Strings are tokenized with the tokenizer's own special tokens; conversations go through its chat template, with a
    generation prompt.

    Raises:
        ValueError: prompts of both kinds in one batch, no chat template or one that refuses a prompt, a prompt of no
            tokens, or one that leaves no room in the model's context; the message names the row.
    """
    kinds = [is_conversation(example, name) for example in examples]
    if any(kinds) and not all(kinds):
        odd = examples[kinds.index(not kinds[0])]
        raise ValueError(
            f"{name}: strings and conversations are mixed: row {odd.position} differs from row {examples[0].position}"
        )
    prompts = [example.row["prompt"] for example in examples]
    if kinds[0]:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{name}: the prompts are conversations, but the tokenizer has no chat template: set "
                "tokenizer.chat_template, or give the prompts as strings"
            )
        ids = _apply_template(examples, tokenizer, name, chat_template_kwargs)
    else:
        ids = tokenizer(text=prompts)["input_ids"]
    for example, prompt in zip(examples, ids, strict=True):
        if not prompt:
            raise ValueError(f"{name}: the prompt of row {example.position} has no tokens: leave the row out")
        if context_length is not None and len(prompt) >= context_length:
            raise ValueError(
                f"{name}: the prompt of row {example.position} has {len(prompt)} tokens, which leaves no room for a "
                f"completion in the model's context of {context_length}: shorten it, or leave the row out"
            )
    return [list(prompt) for prompt in ids], kinds[0]


def _apply_template(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, name: str, settings: Mapping[str, Any]
) -> Any:
    prompts = [list(example.row["prompt"]) for example in examples]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **settings}
    try:
        encoded: Any = tokenizer.apply_chat_template(prompts, **settings)
        return encoded["input_ids"]
    except Exception as error:  # a template raises what it likes
        if len(examples) == 1:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{name}: the prompt of row {examples[0].position}: {reason}") from error
        for example in examples:
            _apply_template([example], tokenizer, name, settings)
        raise


def completion_room(prompt_ids: Sequence[Sequence[int]], max_tokens: int, context_length: int | None) -> int:
    """Tokens that the completions of a batch of prompts may have: `max_tokens`, or what the model's context leaves."""
    room = max_tokens if context_length is None else context_length - max(map(len, prompt_ids), default=0)
    if room < max_tokens:
        logger.warning_once(
            f"A prompt leaves {room} tokens of the model's context, fewer than max_completion_length ({max_tokens}): "
            "the completions of its batch are cut there."
        )
    return min(room, max_tokens)


def decode_completions(
    completion_ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, conversational: bool
) -> list[Any]:
    """What reward functions get: strings, or for conversations `[{"role": "assistant", "content": string}]`."""
    texts = tokenizer.batch_decode([list(ids) for ids in completion_ids], skip_special_tokens=True)
    return [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts


def context_length_of(config: PretrainedConfig) -> int | None:
    """Positions the model can attend to, or None where its config does not say."""
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None
