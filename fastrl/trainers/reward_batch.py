"""Batches of a reward model: the answers of each row side by side, read at their tokens, and what is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastrl.data.reward_rows import IGNORE
from fastrl.data.token_rows import TokenRow
from fastrl.trainers.row_batch import RowBatch, row_tensors
from fastrl.trainers.token_batch import pad


@dataclass(frozen=True)
class RewardBatch(RowBatch):
    """Answers with a token of padding behind each, so that there is a place for the hidden state at an answer's last
    token: it is the one that would score this token. `loss_mask` says which states the loss reads."""

    margin: Tensor | None = field(default=None, kw_only=True)  # (B,) fp32, of the pair that the answer belongs to
    rank: Tensor | None = field(default=None, kw_only=True)  # (B,) fp32, smaller is better
    label: Tensor | None = field(default=None, kw_only=True)  # (B,) bool: a right answer
    labels: Tensor | None = field(default=None, kw_only=True)  # (B, T) int64 of steps; -100: none

    @property
    def num_tokens(self) -> int:
        """Tokens of the answers with their prompts."""
        return super().num_tokens - len(self)


def collate_rewards(rows: Sequence[TokenRow], pad_token_id: int) -> RewardBatch:
    """Rows side by side, on the CPU."""
    longer = [{**row, "completion_ids": [[*ids, pad_token_id] for ids in row["completion_ids"]]} for row in rows]
    fields = row_tensors(longer, pad_token_id)
    if "margin" in rows[0]:
        fields["margin"] = torch.tensor([row["margin"] for row in rows])[fields["row"]]
    if "ranks" in rows[0]:
        fields["rank"] = torch.tensor([rank for row in rows for rank in row["ranks"]])
    if "label" in rows[0]:
        fields["label"] = torch.tensor([row["label"] for row in rows])[fields["row"]]
    if "labels" in rows[0]:
        fields["labels"], _ = pad([row["labels"] for row in rows], IGNORE, left=False, device=torch.device("cpu"))
    return RewardBatch(**fields)


def by_prompt(values: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Values (B,) of answers as a table (P, K), a line for each row of the dataset, and the mask of what is there.

    Args:
        row: (B,) the row of each answer, ascending.
    """
    _, line, counts = torch.unique_consecutive(row, return_inverse=True, return_counts=True)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[line]
    size = (len(counts), int(counts.max()))
    present = torch.zeros(size, dtype=torch.bool, device=row.device).index_put(
        (line, place), torch.ones_like(row, dtype=torch.bool)
    )
    return values.new_zeros(size).index_put((line, place), values), present


def ranked_pairs(batch: RewardBatch) -> Tensor:
    """(P,): how many pairs of each prompt's answers differ in rank."""
    if batch.rank is None:
        raise ValueError("the batch has no ranks")
    ranks, present = by_prompt(batch.rank, batch.row)
    before = present[:, :, None] & present[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    return before.sum((-2, -1))
