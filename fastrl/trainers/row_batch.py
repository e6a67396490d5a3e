"""Batches of dataset rows: the sequences of some rows, and passes that keep a row's sequences together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer

from fastrl.data.token_rows import TokenRow, TokenRows
from fastrl.trainers.packing import Packer, Pass
from fastrl.trainers.token_batch import TokenBatch, pad


@dataclass(frozen=True)
class RowBatch(TokenBatch):
    """The sequences of some rows of a dataset, those of a row side by side."""

    row: Tensor  # (B,) int64: the row of the batch that a sequence belongs to, ascending


Rows = TypeVar("Rows", bound=RowBatch)


def row_tensors(rows: Sequence[TokenRow], pad_token_id: int) -> dict[str, Tensor]:
    """The fields of a `RowBatch` from tokenized rows."""
    cpu = torch.device("cpu")
    prompts, completions, masks = (
        [sequence for row in rows for sequence in row[name]] for name in ("prompt_ids", "completion_ids", "loss_mask")
    )
    prompt_ids, prompt_mask = pad(prompts, pad_token_id, left=True, device=cpu)
    completion_ids, completion_mask = pad(completions, pad_token_id, left=False, device=cpu)
    loss_mask, _ = pad(masks, False, left=False, device=cpu)
    numbers = [number for number, row in enumerate(rows) for _ in row["prompt_ids"]]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "loss_mask": loss_mask,
        "row": torch.tensor(numbers),
    }


def collate_rows(rows: Sequence[TokenRow], pad_token_id: int) -> RowBatch:
    """Rows side by side, on the CPU."""
    return RowBatch(**row_tensors(rows, pad_token_id))


def own_rows(batch: Rows, accelerator: Accelerator, batch_size: int) -> Rows:
    """The batch without the rows that accelerate repeats at a dataset's end, for all processes to have equally many."""
    end = accelerator.gradient_state
    if accelerator.num_processes == 1 or not end.end_of_dataloader or end.remainder <= 0:
        return batch
    kept = batch.row < end.remainder - accelerator.process_index * batch_size
    return batch if bool(kept.all()) else batch.select(kept)


def whole_row_passes(packer: Packer, batch: Rows) -> list[Pass[Rows]]:
    """The passes of a batch, none of which holds only a part of a row; rows that fit in the token budget share one."""
    lengths = batch.prompt_mask.sum(-1) + batch.completion_mask.sum(-1)
    of_row = torch.zeros(int(batch.row[-1]) + 1, dtype=lengths.dtype, device=lengths.device)
    chunks, room = [0], packer.tokens
    for number, length in enumerate(of_row.index_add(0, batch.row, lengths).tolist()):
        if length > room and number:
            chunks.append(number)
            room = packer.tokens
        room -= length
    passes = []
    for first, last in zip(chunks, [*chunks[1:], len(of_row)], strict=True):
        places = ((batch.row >= first) & (batch.row < last)).nonzero().squeeze(-1)
        (part,) = packer.passes(batch.select(places), together=True)
        passes.append(replace(part, sequences=places[part.sequences]))
    return passes


def with_values(
    trainer: Trainer, rows: TokenRows, name: str, values: Callable[[Any], Tensor], batch_size: int
) -> TokenRows:
    """The rows with a column `name`: what `values` gives for each sequence of a batch, (B,), in lists of K.

    For what would be the same in every epoch, such as reference log-probabilities. The processes share the work.
    """
    args, accelerator, collate = trainer.args, trainer.accelerator, trainer.data_collator
    rank, world = args.process_index, args.world_size
    starts = range(rank * batch_size, len(rows), world * batch_size)
    found: list[tuple[int, list[float]]] = []
    for start in tqdm(starts, desc=f"{name} of {rows.name}", disable=args.disable_tqdm or rank > 0):
        places = range(start, min(start + batch_size, len(rows)))
        batch: Any = collate([rows[place] for place in places])
        with torch.no_grad(), accelerator.autocast():
            of_sequence = values(batch.to(args.device)).tolist()
        of_row: list[list[float]] = [[] for _ in places]
        for number, value in zip(batch.row.tolist(), of_sequence, strict=True):
            of_row[number].append(value)
        found += zip(places, of_row, strict=True)
    return rows.with_column(name, [found_values for _, found_values in sorted(gather_object(found))])
