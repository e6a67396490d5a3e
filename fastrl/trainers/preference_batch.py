"""Batches of preferences: the answers of each row side by side, and what a loss knows of each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from typing_extensions import Self

from fastrl.data.token_rows import TokenRow
from fastrl.objectives.pairs import summarize, token_counts
from fastrl.objectives.preference import answer_tokens
from fastrl.trainers.packing import Pass
from fastrl.trainers.row_batch import RowBatch, row_tensors


@dataclass(frozen=True)
class PreferenceBatch(RowBatch):
    """Pairs (or triples) of answers; or single answers with a label, each followed by a mismatched one if KTO asks."""

    ref_logps: Tensor | None = field(default=None, kw_only=True)  # (B,) under the reference, computed before training
    label: Tensor | None = field(default=None, kw_only=True)  # (B,) bool: a good answer
    mismatched: Tensor | None = field(default=None, kw_only=True)  # (B,) bool: the answer is of another prompt

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequences that are trained on."""
        tokens = self.prompt_mask.sum(-1) + self.completion_mask.sum(-1)
        return int(tokens.sum() if self.mismatched is None else tokens[~self.mismatched].sum())

    def only(self, mismatched: bool) -> Self:
        """The mismatched answers, or those that are not."""
        if self.mismatched is None:
            raise ValueError("the batch has no mismatched answers")
        return self.select((self.mismatched == mismatched).nonzero().squeeze(-1))


def collate_preferences(rows: Sequence[TokenRow], pad_token_id: int) -> PreferenceBatch:
    """Rows side by side, on the CPU."""
    fields = row_tensors(rows, pad_token_id)
    if "ref_logps" in rows[0]:
        fields["ref_logps"] = torch.tensor([value for row in rows for value in row["ref_logps"]])
    if "label" in rows[0]:
        fields["label"] = torch.tensor([row["label"] for row in rows])[fields["row"]]
        fields["mismatched"] = fields["row"].diff(prepend=torch.tensor([-1])) == 0
    return PreferenceBatch(**fields)


def by_kind(part: Pass[PreferenceBatch], kinds: int) -> Pass[PreferenceBatch]:
    """The same pass with its sequences in another order: the first ones of all rows, then the second ones, ..."""
    order = torch.arange(len(part.batch), device=part.sequences.device).view(-1, kinds).T.flatten()
    return replace(part, sequences=part.sequences[order], batch=part.batch.select(order), places=part.places[order])


def summed_logps(logps: Tensor, batch: PreferenceBatch, kinds: int, tail_weight: float | None) -> Tensor:
    """(B,): log-probabilities (B, T) summed over each answer as a preference loss does.

    Args:
        kinds: sequences of a row; of two or three the first two are the pair.
        tail_weight: of the tokens beyond the length that both answers of a pair reach (LD-DPO); None: 1.
    """
    tokens = answer_tokens(logps, batch.mask)
    count = token_counts(tokens)
    if tail_weight is None:
        return summarize(tokens, count).logps
    pairs = count.view(-1, kinds)
    shared = torch.minimum(pairs[:, 0], pairs[:, 1]).repeat_interleave(kinds)
    return summarize(tokens, count, shared=shared, tail_weight=tail_weight).logps
