"""A dataset as a trainer uses it: every row tokenized once, checked, and without the rows that nothing can be learned
from. A row holds one or several sequences: a text, the two answers of a preference, K ranked answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from datasets import IterableDataset as StreamedDataset
from tqdm.auto import tqdm
from transformers.utils import logging

from fastrl.data.formats import FormatError, TokenSequence

logger = logging.get_logger(__name__)

TokenRow = dict[str, Any]  # "prompt_ids", "completion_ids", "loss_mask": lists of K lists; and a trainer's own columns


class TokenRows(torch.utils.data.Dataset[TokenRow]):
    """Tokenized rows, and the name of the argument that they came as."""

    def __init__(self, rows: Dataset, name: str) -> None:
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenRow:
        return dict(self.rows[index])

    def with_column(self, name: str, values: Sequence[Any]) -> TokenRows:
        """With one more column, a value for each row."""
        return TokenRows(self.rows.add_column(name, list(values)), self.name)


def token_row(sequences: Sequence[TokenSequence], **columns: Any) -> TokenRow:
    """A row of these sequences and of a trainer's own columns."""
    return {
        "prompt_ids": [sequence.prompt_ids for sequence in sequences],
        "completion_ids": [sequence.completion_ids for sequence in sequences],
        "loss_mask": [sequence.loss_mask for sequence in sequences],
        **columns,
    }


def tokenize_rows(
    rows: Any,
    name: str,
    tokenize: Callable[[Mapping[str, Any]], TokenRow],
    *,
    columns: Mapping[str, Any] | None = None,
    context_length: int | None = None,
    num_proc: int | None = None,
    progress: bool = True,
) -> TokenRows:
    """Every row tokenized; rows with a sequence in which nothing counts are left out, with a warning.

    Args:
        rows: a `datasets.Dataset`, whose result `datasets` caches, or a list of dicts.
        name: the argument it came as, for error messages.
        tokenize: a row -> `token_row`; it may raise `FormatError`. Loadable by worker processes.
        columns: a trainer's own columns and their `datasets` types.
        context_length: positions of the model; None: no limit.
        num_proc: processes that tokenize a `datasets.Dataset`.

    Raises:
        TypeError: a streamed dataset, or something that is not rows.
        ValueError: no rows, a row that cannot be tokenized or is longer than the context, or no row that is left; the
            message names the argument and the row.
    """
    check_rows(rows, name)
    features = Features(
        {
            "prompt_ids": List(List(Value("int32"))),
            "completion_ids": List(List(Value("int32"))),
            "loss_mask": List(List(Value("bool"))),
            **(columns or {}),
            "longest": Value("int32"),
            "counted": Value("int32"),
        }
    )
    function = _RowFunction(tokenize, name, context_length)
    if isinstance(rows, Dataset):
        with PartialState().main_process_first():  # the others read what the first has cached
            table = rows.map(
                function,
                with_indices=True,
                remove_columns=rows.column_names,
                features=features,
                num_proc=num_proc,
                desc=f"Tokenizing {name}",
            )
    else:
        places = tqdm(range(len(rows)), desc=f"Tokenizing {name}", disable=not progress)
        table = Dataset.from_list([function(rows[place], place) for place in places], features=features)
    kept = np.flatnonzero(np.asarray(table["counted"]))
    if len(kept) < len(table):
        logger.warning(
            f"{name}: {len(table) - len(kept)} of {len(table)} rows left out: no token to train on is left of "
            "them, within max_length"
        )
        table = table.select(kept)
    if not len(table):
        raise ValueError(f"{name}: no row has a token to train on; if prompts fill max_length, raise it")
    return TokenRows(table, name)


def check_datasets(train_dataset: Any, eval_dataset: Any) -> None:
    """Raises what `tokenize_rows` raises before it looks at a row, for the datasets that a trainer is given."""
    if train_dataset is None:
        raise ValueError("train_dataset: needed")
    check_rows(train_dataset, "train_dataset")
    if isinstance(eval_dataset, dict) and eval_dataset:
        for key, rows in eval_dataset.items():
            check_rows(rows, f"eval_dataset[{key!r}]")
    elif eval_dataset is not None:
        check_rows(eval_dataset, "eval_dataset")


def advice_on_empty(name: str) -> str:
    """What an error adds where the dataset of an argument has no rows."""
    return "" if name == "train_dataset" else "; give it rows, or leave it out, with eval_strategy='no'"


def check_rows(rows: Any, name: str) -> None:
    """Raises what `tokenize_rows` raises before it looks at a row."""
    if isinstance(rows, StreamedDataset | torch.utils.data.IterableDataset):
        raise TypeError(
            f"{name}: streamed (iterable) datasets are not supported; load it without streaming=True, or take a part "
            "of it: datasets.Dataset.from_list(list(stream.take(n)))"
        )
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__") or (isinstance(rows, Mapping) and rows):
        raise TypeError(f"{name}: expected a datasets.Dataset or a list of rows, got {type(rows).__name__}")
    if not len(rows):
        raise ValueError(f"{name}: the dataset is empty{advice_on_empty(name)}")


@dataclass(frozen=True)
class _RowFunction:  # not a closure: worker processes must be able to load it
    tokenize: Callable[[Mapping[str, Any]], TokenRow]
    name: str
    context_length: int | None

    def __call__(self, row: Any, place: int) -> TokenRow:
        if not isinstance(row, Mapping):
            raise TypeError(f"{self.name}: row {place}: expected a dict, got {type(row).__name__}")
        try:
            tokens = self.tokenize(row)
        except Exception as error:  # a chat template and a formatting_func raise what they like
            reason = str(error) if isinstance(error, FormatError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.name}: row {place}: {reason}") from error
        lengths = [len(p) + len(c) for p, c in zip(tokens["prompt_ids"], tokens["completion_ids"], strict=True)]
        longest = max(lengths)
        if self.context_length is not None and longest > self.context_length:
            raise ValueError(
                f"{self.name}: row {place}: {longest} tokens are more than the model's context of "
                f"{self.context_length}; set max_length to at most that"
            )
        counted = min(sum(mask) for mask in tokens["loss_mask"])
        return {**tokens, "longest": longest, "counted": counted}
