"""The micro-batches of an optimizer step: what their losses are divided by, and what can be left out of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fastrl.objectives import PolicyObjective
from fastrl.trainers.packing import prompt_numbers
from fastrl.trainers.rollouts import Rollouts
from fastrl.trainers.token_batch import TokenBatch

Batch = TypeVar("Batch", bound=TokenBatch)


@dataclasses.dataclass(frozen=True)
class MicroBatch(Generic[Batch]):
    """The sequences of one forward and backward, and the counts that their loss is divided by.

    The gradient is averaged over processes, so a step's counts are those of all processes divided by their number:
    losses divided by them add up to the loss of the optimizer step, whatever the split.
    """

    rollouts: Batch
    part: Batch  # what they are rows of: this micro-batch before dead sequences were left out
    rows: Tensor  # (B,) of part
    sequences: int  # before dead ones were left out
    tokens: int  # likewise; tokens that count
    step_sequences: float
    step_filled: float  # sequences with a token that counts
    step_tokens: float
    count: int  # micro-batches of the step on this process

    def select(self, rows: Tensor) -> "MicroBatch[Batch]":
        """The sequences of an index or a mask; the counts stay."""
        return dataclasses.replace(self, rollouts=self.rollouts.select(rows), rows=self.rows[rows])

    def divisor(self, objective: PolicyObjective) -> float | None:
        """What the policy loss is divided by: a count of the optimizer step, as the aggregation wants it.

        That is tokens, sequences (of which verl and OpenRLHF leave out those without a token), or sequences times
        max_completion_length; for bnpo the micro-batch's own tokens, as many times as there are micro-batches, since it
        is a mean per micro-batch by definition. At least 1: with no token every term is 0, whatever it is divided by.
        """
        entry = objective.surrogate
        aggregation = objective.aggregation or entry.aggregation
        if aggregation == "token-sum":
            return None
        if aggregation == "token-mean":
            count = self.tokens * self.count if objective.loss_type == "bnpo" else self.step_tokens
        else:
            everything = objective.conventions.counts_empty or entry.per_sequence
            count = self.step_sequences if everything else self.step_filled
        length = objective.max_completion_length if aggregation == "seq-mean-token-sum-norm" else 1
        return max(float(count), 1.0) * float(length or 1)


def micro_batches(
    parts: Sequence[Batch], total: Callable[[Tensor], Tensor], num_processes: int
) -> list[MicroBatch[Batch]]:
    """This process's share of an optimizer step, with the step's counts.

    Args:
        parts: the share.
        total: sums counts over processes.
        num_processes: how many there are.
    """
    tokens_of = [int(part.mask.sum()) for part in parts]
    filled = sum(int(part.mask.any(-1).sum()) for part in parts)
    counts = total(torch.tensor([sum(map(len, parts)), filled, sum(tokens_of)]))
    sequences, filled_sequences, tokens = (float(count) / num_processes for count in counts)
    return [
        MicroBatch(
            rollouts=part,
            part=part,
            rows=torch.arange(len(part), device=part.prompt_ids.device),
            sequences=len(part),
            tokens=own,
            step_sequences=sequences,
            step_filled=filled_sequences,
            step_tokens=tokens,
            count=len(parts),
        )
        for part, own in zip(parts, tokens_of, strict=True)
    ]


def live_sequences(rollouts: Rollouts, objective: PolicyObjective) -> Tensor:
    """(B,) bool: the sequences that can carry a gradient (`PolicyObjective.live_tokens`); the others' terms are 0.

    An exact KL acts on every token. What ranks the tokens of the batch (a top-entropy quantile, covariances) ranks dead
    ones too, so nothing is dropped then, unless nothing is live at all.
    """
    if objective.exact_kl:
        return rollouts.mask.any(-1)
    live = live_tokens(rollouts, objective).any(-1)
    if ranks_tokens(objective) and bool(live.any()):
        return rollouts.mask.any(-1)
    return live


def live_tokens(rollouts: Rollouts, objective: PolicyObjective) -> Tensor:
    """(B, T) bool: the tokens that can carry a gradient."""
    return objective.live_tokens(
        advantages=rollouts.advantages, mask=rollouts.mask, importance_ratio=rollouts.importance_ratio
    )


def ranks_tokens(objective: PolicyObjective) -> bool:
    """Whether a token's loss depends on the others of its micro-batch."""
    return objective.top_entropy_quantile < 1 or objective.surrogate.covariance


def groups_together(rollouts: Batch, steps: int) -> Batch:
    """The same sequences, those of a prompt side by side, within each of `steps` equal runs of them.

    Micro-batches cut from a run then share the encoding of their prompts. An optimizer step that takes whole runs sums
    the same terms in another order.
    """
    runs = prompt_numbers(rollouts).view(steps, -1)
    order = runs.argsort(dim=-1, stable=True) + torch.arange(steps, device=runs.device)[:, None] * runs.shape[1]
    return rollouts.select(order.flatten())


def live_fractions(
    parts: Sequence[Rollouts], objective: PolicyObjective, total: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """The shares of tokens and of sequences that can carry a gradient, over all processes."""
    live = [live_tokens(part, objective) for part in parts]
    counts = [
        [int(mask.sum()), int(part.mask.sum()), int(mask.any(-1).sum()), len(part)]
        for mask, part in zip(live, parts, strict=True)
    ]
    tokens, of_tokens, rows, of_rows = total(torch.tensor(counts).sum(0)).tolist()
    return {"live_fraction": tokens / max(of_tokens, 1.0), "live_sequence_fraction": rows / of_rows}
