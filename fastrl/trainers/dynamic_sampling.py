"""Dynamic sampling (DAPO, Yu et al. 2025, section 3.2): groups that teach nothing give way to those of others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TrainerState

from fastrl.objectives import combine_rewards
from fastrl.objectives.advantages import group_statistics
from fastrl.trainers.prompts import Example
from fastrl.trainers.rollout_collector import RolloutCollector, Samples


@dataclass
class GroupRefill:
    """Replaces the groups of a rollout whose rewards are all equal, or of which fewer than two exist.

    Each round every process samples as many further prompts as the neediest one lacks groups, and keeps what it needs.
    After `max_rounds` rounds the first of its own unanimous groups fill up what is still missing.

    Metrics of a rollout, over all processes: `dynamic_sampling/unanimous_fraction` of the groups sampled,
    `dynamic_sampling/groups_dropped`, `dynamic_sampling/rounds`, and `dynamic_sampling/groups_unfilled`.

    Args:
        draw: the examples of further prompts, so many for each process.
        total: sums over processes.
    """

    collector: RolloutCollector
    draw: Callable[[int], Sequence[Example]]
    total: Callable[[Tensor], Tensor]
    max_rounds: int

    def __call__(self, samples: Samples, rewards: Tensor, state: TrainerState) -> tuple[Samples, Tensor]:
        """The rollout with other groups, and the rewards of all processes.

        Args:
            samples: of this process.
            rewards: (B, F) of all processes' completions, as `RolloutCollector.reward` gives them.
        """
        wanted = len(samples.examples) // samples.group
        pieces = [(samples, self.collector.own_rows(rewards))]
        lively, unanimous = self._sorted(pieces[0])
        kept, spare = [(0, group) for group in lively], [(0, group) for group in unanimous]
        rounds = seen = 0
        while rounds < self.max_rounds:
            most = int(self.collector.accelerator.gather(self._count(wanted - len(kept))).max())
            if most <= 0:
                break
            rounds += 1
            more = self.collector.collect(self.draw(most), "train_dataset", samples.mode, state)
            pieces.append((more, self.collector.own_rows(self.collector.reward(more, state))))
            lively, unanimous = self._sorted(pieces[-1])
            kept += [(rounds, group) for group in lively]
            seen += most
        chosen = sorted([*kept, *spare][:wanted]) if len(kept) < wanted else kept[:wanted]
        self._log(samples.mode, wanted, len(kept), wanted + seen, rounds)
        if rounds == 0:
            return samples, rewards
        rows = [list(range(group * samples.group, (group + 1) * samples.group)) for _, group in chosen]
        picked = self.collector.picked([(pieces[i][0], r) for (i, _), r in zip(chosen, rows, strict=True)])
        own = torch.cat([pieces[i][1][r] for (i, _), r in zip(chosen, rows, strict=True)])
        return picked, self.collector.accelerator.gather(own)

    def _sorted(self, piece: tuple[Samples, Tensor]) -> tuple[list[int], list[int]]:
        """The groups that teach something, and the others."""
        samples, rewards = piece
        runner = self.collector.rewards
        assert runner is not None  # it gave the rewards
        ids = torch.arange(len(rewards), device=rewards.device) // samples.group
        _, summed = combine_rewards(rewards, runner.weights.to(rewards), ids)
        deviations = group_statistics(summed, ids)[1][:: samples.group].tolist()
        lively = [group for group, deviation in enumerate(deviations) if deviation > 0]
        return lively, [group for group in range(len(deviations)) if group not in set(lively)]

    def _count(self, value: int) -> Tensor:
        return torch.tensor([value], device=self.collector.accelerator.device)

    def _log(self, mode: str, wanted: int, kept: int, sampled: int, rounds: int) -> None:
        counts = self.total(torch.tensor([sampled - kept, sampled, max(wanted - kept, 0)]))
        unanimous, everything, unfilled = counts.tolist()
        self.collector.metrics.add(
            mode,
            {
                "dynamic_sampling/unanimous_fraction": unanimous / everything,
                "dynamic_sampling/groups_dropped": unanimous - unfilled,
                "dynamic_sampling/rounds": rounds,
                "dynamic_sampling/groups_unfilled": unfilled,
            },
        )
