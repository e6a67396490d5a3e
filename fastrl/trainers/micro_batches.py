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
    sequences: int  # before dead ones were left out
    tokens: int  # likewise; tokens that count
    step_sequences: float
    step_tokens: float
    count: int  # micro-batches of the step on this process

    def select(self, rows: Tensor) -> "MicroBatch[Batch]":
        """The sequences of an index or a mask; the counts stay."""
        return dataclasses.replace(self, rollouts=self.rollouts.select(rows))

    def divisor(self, objective: PolicyObjective) -> float:
        """What the policy loss is divided by, at least 1: with no token every term is 0, whatever it is divided by.

        Counted are sequences (grpo), sequences x max_completion_length (dr_grpo), tokens (dapo), or the micro-batch's
        own tokens, as many times as there are micro-batches (bnpo, which is a mean per micro-batch by definition).
        """
        counts = {
            "grpo": self.step_sequences,
            "dr_grpo": self.step_sequences * float(objective.max_completion_length or 0),
            "bnpo": float(self.tokens * self.count),
            "dapo": self.step_tokens,
        }
        return max(counts[objective.loss_type], 1.0)


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
    counts = total(torch.tensor([sum(map(len, parts)), sum(tokens_of)]))
    sequences, tokens = (float(count) / num_processes for count in counts)
    return [
        MicroBatch(part, len(part), own, sequences, tokens, len(parts))
        for part, own in zip(parts, tokens_of, strict=True)
    ]


def live_sequences(rollouts: Rollouts, objective: PolicyObjective) -> Tensor:
    """(B,) bool: the sequences that can carry a gradient (`PolicyObjective.live_tokens`); the others' terms are 0.

    A top-entropy quantile ranks the tokens of the batch, dead ones included, so with one nothing is dropped, unless
    nothing is live at all.
    """
    live = objective.live_tokens(advantages=rollouts.advantages, mask=rollouts.mask).any(-1)
    if objective.top_entropy_quantile < 1 and bool(live.any()):
        return rollouts.mask.any(-1)
    return live


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
    live = [objective.live_tokens(advantages=part.advantages, mask=part.mask) for part in parts]
    counts = [
        [int(mask.sum()), int(part.mask.sum()), int(mask.any(-1).sum()), len(part)]
        for mask, part in zip(live, parts, strict=True)
    ]
    tokens, of_tokens, rows, of_rows = total(torch.tensor(counts).sum(0)).tolist()
    return {"live_fraction": tokens / max(of_tokens, 1.0), "live_sequence_fraction": rows / of_rows}
