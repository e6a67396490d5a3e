"""Groups of rows, given by ids of any value in any order: statistics without a loop, deterministic."""

from __future__ import annotations

import torch
from torch import Tensor


class Groups:
    """Rows of equal id. Every method takes one value (or one vector of values) per row and returns as many."""

    def __init__(self, ids: Tensor) -> None:  # (B,)
        self._order = ids.argsort(stable=True)
        _, numbers, self._sizes = ids[self._order].unique_consecutive(return_inverse=True, return_counts=True)
        self._number = torch.zeros_like(numbers).scatter(0, self._order, numbers)  # of each row's group

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        """One value per group."""
        if x.numel() == 0:
            return x
        # unsafe leaves out the check of the lengths, which are right.
        return torch.segment_reduce(x.index_select(0, self._order), how, lengths=self._sizes, axis=0, unsafe=True)

    def _spread(self, per_group: Tensor) -> Tensor:
        return per_group.index_select(0, self._number) if per_group.numel() else per_group

    def sum(self, x: Tensor) -> Tensor:
        """Sum over each row's group; a NaN stays in its group."""
        return self._spread(self._reduce(x, "sum"))

    def max(self, x: Tensor) -> Tensor:
        return self._spread(self._reduce(x, "max"))

    def ratio(self, numerator: Tensor, denominator: Tensor, eps: float) -> Tensor:
        """`sum(numerator) / (sum(denominator) + eps)`"""
        return self._spread(self._reduce(numerator, "sum") / (self._reduce(denominator, "sum") + eps))

    def count(self, members: Tensor) -> Tensor:
        """Members among the rows of each group, as float64; members: `(B,)` bool."""
        counts = torch.zeros_like(self._sizes, dtype=torch.float64)  # whole numbers: exact in any order of adding
        return counts.index_add(0, self._number, members.to(torch.float64))[self._number]

    def mean(self, x: Tensor, members: Tensor, weights: Tensor | None = None) -> Tensor:
        """Weighted mean of the members of each row's group: exactly their value where all agree, 0 without weight."""
        pivot = -self.max(torch.where(members, -x, -torch.inf))  # the smallest member, so that equal ones leave 0s
        weights = torch.where(members, 1.0 if weights is None else weights.to(x), 0.0).to(x)
        total = self.sum(weights)
        mean = pivot + self.sum(torch.where(members, weights * (x - pivot), 0.0)) / total
        return torch.where(total > 0, mean, 0.0)

    def deviation(self, x: Tensor, members: Tensor) -> Tensor:
        """Standard deviation of the members (Bessel): exactly 0 where all agree, NaN for fewer than two."""
        squares = torch.where(members, x - self.mean(x, members), 0.0).square()
        return (self.sum(squares) / (self.count(members) - 1)).sqrt()

    def ascending(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows group by group, each group's from the smallest x to the largest (NaN last), and their ranks, from 0."""
        by_value = x.argsort(stable=True)
        order = by_value[self._number[by_value].argsort(stable=True)]
        starts = (self._sizes.cumsum(0) - self._sizes).repeat_interleave(self._sizes)
        return order, torch.arange(x.shape[0], device=x.device) - starts


def running_sum(x: Tensor, rank: Tensor) -> Tensor:
    """Inclusive sums over runs whose entries are ranked 0, 1, ...: log2 of the longest run in steps, no run leaks."""
    step = 1
    while step < x.shape[0] and bool((rank >= step).any()):
        x = x + torch.where(rank >= step, x.roll(step), 0.0)
        step *= 2
    return x
