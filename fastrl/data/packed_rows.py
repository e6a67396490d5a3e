"""Rows filled up to a number of tokens, so that every batch has nearly as many: blocks of whole sequences, or a stream
of tokens cut into pieces."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

from datasets import Dataset

from fastrl.data.formats import Text, sequence_of
from fastrl.data.token_rows import TokenRow, TokenRows, token_row


class PackedRows(TokenRows):
    """Blocks of the sequences of some rows; a row of this dataset is a block.

    Args:
        source: rows of one or several sequences, each of at most `size` tokens.
        size: tokens of a block, at most.
    """

    def __init__(self, source: TokenRows, size: int) -> None:
        super().__init__(source.rows, source.name)
        prompts, completions = source.rows["prompt_ids"], source.rows["completion_ids"]
        places, lengths = [], []
        for row, (of_prompts, of_completions) in enumerate(zip(prompts, completions, strict=True)):
            for index, (prompt, completion) in enumerate(zip(of_prompts, of_completions, strict=True)):
                places.append((row, index))
                lengths.append(len(prompt) + len(completion))
        self.blocks = [[places[i] for i in block] for block in best_fit_decreasing(lengths, size)]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> TokenRow:
        block = [(self.rows[row], index) for row, index in self.blocks[index]]
        names = ("prompt_ids", "completion_ids", "loss_mask")
        return {name: [row[name][index] for row, index in block] for name in names}


def best_fit_decreasing(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Items into bins of `size`: the longest first, each into the fullest bin that it fits in (the oldest of those).

    Raises:
        ValueError: an item longer than a bin.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), ascending
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[item] > size:
            raise ValueError(f"a sequence of {lengths[item]} tokens does not fit into a block of {size}")
        place = bisect.bisect_left(rooms, (lengths[item], 0))
        room, number = rooms.pop(place) if place < len(rooms) else (size, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(item)
        bisect.insort(rooms, (room - lengths[item], number))
    return bins


def wrapped(source: TokenRows, size: int) -> TokenRows:
    """All sequences in one stream, cut every `size` tokens; a row of the result is a piece, as one sequence."""

    def pieces() -> Iterator[Text]:
        ids: list[int] = []
        counted: list[bool] = []
        for row in source.rows:
            for prompt, completion, mask in zip(
                row["prompt_ids"], row["completion_ids"], row["loss_mask"], strict=True
            ):
                ids += prompt + completion
                counted += [False] * len(prompt) + mask
            while len(ids) >= size:
                yield Text(ids[:size], counted[:size])
                ids, counted = ids[size:], counted[size:]
        if ids:
            yield Text(ids, counted)

    rows = [token_row([sequence_of(text)], longest=len(text.ids), counted=sum(text.counted)) for text in pieces()]
    kept = [row for row in rows if any(row["loss_mask"][0])]
    return TokenRows(Dataset.from_list(kept, features=source.rows.features), source.name)
