"""Rows of preferences to tokens: pairs, triples with a gold answer, and single answers that are good or bad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from fastrl.data.formats import Encoder, FormatError, Row, Text, as_chatml, pair_of, sequence_of, truncated
from fastrl.data.row_functions import unpaired
from fastrl.data.token_rows import TokenRow, TokenRows, check_rows, token_row


@dataclass(frozen=True)
class PairRow:
    """A preference row to its chosen and its rejected sequence; with `gold` to a third, of column "reference"."""

    encoder: Encoder
    gold: bool
    max_length: int | None
    truncation_mode: str

    def __call__(self, row: Row) -> TokenRow:
        texts = self.encoder.preference(row, self.gold).texts()
        return token_row([sequence_of(truncated(text, self.max_length, self.truncation_mode)) for text in texts])


@dataclass(frozen=True)
class AnswerRow:
    """An unpaired row to its sequence, with "label": whether the answer is a good one."""

    encoder: Encoder
    max_length: int | None
    truncation_mode: str

    def __call__(self, row: Row) -> TokenRow:
        completions, label = self.encoder.unpaired(row)
        (text,) = completions.texts()
        return token_row([sequence_of(truncated(text, self.max_length, self.truncation_mode))], label=label)


def unpaired_rows(rows: Any, name: str) -> Any:
    """Preference rows as twice as many unpaired ones; unpaired rows as they are.

    As TRL's `unpair_preference_dataset`: of every thousand rows first the chosen answers, then the rejected ones.

    Args:
        rows: a `datasets.Dataset` or a list of dicts.
        name: the argument it came as.

    Raises:
        ValueError: a row that is no preference, named; no rows.
    """
    check_rows(rows, name)
    if not isinstance(rows[0], Mapping) or not {"chosen", "rejected"} <= set(rows[0]):
        return rows
    table = rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))
    with PartialState().main_process_first():  # the others read what the first has cached
        return table.map(
            _unpaired,
            batched=True,
            with_indices=True,
            remove_columns=table.column_names,
            fn_kwargs={"name": name},
            desc=f"Unpairing {name}",
        )


def _unpaired(columns: Mapping[str, list[Any]], places: Sequence[int], name: str) -> dict[str, list[Any]]:
    pairs = []
    for number, place in enumerate(places):
        try:
            pairs.append(pair_of(as_chatml({column: values[number] for column, values in columns.items()})))
        except FormatError as error:
            raise ValueError(f"{name}: row {place}: {error}") from error
    prompts, chosen, rejected = (list(values) for values in zip(*pairs, strict=True))
    return unpaired({**columns, "prompt": prompts, "chosen": chosen, "rejected": rejected})


def with_mismatched(rows: TokenRows, group: int, max_length: int | None, truncation_mode: str) -> TokenRows:
    """Each row's prompt a second time, with the answer of another row: KTO's estimate of the KL is over these.

    The other row is the one before it among the `group` rows that stand together, for the first of them the last one,
    as in TRL. A last group of one row has only itself. The sequence is cut at `max_length`.
    """

    def with_other(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for row, (prompt, *_) in enumerate(columns["prompt_ids"]):
            answer = columns["completion_ids"][row - 1][0]
            text = Text(prompt + answer, [False] * len(prompt) + [True] * len(answer))
            other = sequence_of(truncated(text, max_length, truncation_mode))
            for name, values in other._asdict().items():
                columns[name][row].append(values)
        return columns

    with PartialState().main_process_first():
        table = rows.rows.map(
            with_other, batched=True, batch_size=group, features=rows.rows.features, desc=f"Mismatching {rows.name}"
        )
    return TokenRows(table, rows.name)
