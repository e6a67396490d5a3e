"""The micro-batches of an optimizer step: what their losses are divided by, and what can be left out of them."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastrl.objectives import PolicyObjective
from fastrl.trainers.packing import prompt_numbers
from fastrl.trainers.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The sequences of one forward and backward, and what their loss is divided by."""

    rollouts: Rollouts
    normalizer: float
    entropy_normalizer: float | None
    sequences: int  # before dead ones were left out
    tokens: int  # likewise

    def live_part(self, objective: PolicyObjective, keep_one: bool) -> "MicroBatch":
        """Without the sequences that cannot carry a gradient (`PolicyObjective.live_tokens`): their terms are 0.

        A top-entropy quantile ranks the tokens of the batch, dead ones included, so with one nothing is dropped,
        unless nothing is live at all. keep_one: leave a sequence also then, for the collectives of its backward.
        """
        rollouts = self.rollouts
        live = objective.live_tokens(advantages=rollouts.advantages, mask=rollouts.mask).any(-1)
        if objective.top_entropy_quantile < 1 and bool(live.any()):
            live = rollouts.mask.any(-1)
        if keep_one and not bool(live.any()):
            live[0] = True
        return self if bool(live.all()) else dataclasses.replace(self, rollouts=rollouts.select(live))


def normalized(
    parts: Sequence[Rollouts],
    objective: PolicyObjective,
    total: Callable[[Tensor], Tensor],
    num_processes: int,
) -> list[MicroBatch]:
    """Micro-batches whose losses add up to the loss of the optimizer step, over all processes.

    Args:
        parts: this process's share of the optimizer step.
        objective: its loss type says what is counted: sequences (grpo), sequences x max_completion_length (dr_grpo),
            tokens (dapo), or the micro-batch's own tokens, as many times as there are micro-batches (bnpo, which is a
            mean per micro-batch by definition).
        total: sums counts over processes.
        num_processes: the gradient is averaged over them, so that each one's share must count that much more.
    """
    tokens_of = [int(part.mask.sum()) for part in parts]
    counts = total(torch.tensor([sum(map(len, parts)), sum(tokens_of)]))
    sequences, tokens = (float(count) / num_processes for count in counts)
    bonus = objective.entropy_coef != 0 and objective.top_entropy_quantile == 1
    batches = []
    for part, own_tokens in zip(parts, tokens_of, strict=True):
        normalizer = {
            "grpo": sequences,
            "dr_grpo": sequences * float(objective.max_completion_length or 0),
            "bnpo": float(own_tokens * len(parts)),
            "dapo": tokens,
        }[objective.loss_type]
        # no token at all: every term is 0, whatever it is divided by
        batches.append(
            MicroBatch(part, max(normalizer, 1.0), max(tokens, 1.0) if bonus else None, len(part), own_tokens)
        )
    return batches


def groups_together(rollouts: Rollouts, objective: PolicyObjective, steps: int) -> Rollouts:
    """The same sequences, those of a prompt side by side, within each of `steps` equal runs of them.

    Micro-batches cut from a run then share the encoding of their prompts. An optimizer step that takes whole runs sums
    the same terms in another order. Where its gradient depends on the split into micro-batches (bnpo, a top-entropy
    quantile) nothing is moved.
    """
    if objective.loss_type == "bnpo" or objective.top_entropy_quantile < 1:
        return rollouts
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
