"""From the rewards of a batch to its advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl_kernels import gae, group_advantages

__all__ = ["combine_rewards", "gae", "group_advantages"]

AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")


def combine_rewards(
    rewards_per_func: Tensor,  # (B, F)
    weights: Tensor | None,  # (F,)
    group_ids: Tensor,  # (B,)
    *,
    aggregation: str = "sum_then_normalize",
    baseline: str = "mean",
    scale: str = "group",
    eps: float = 1e-4,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages from several reward functions, with TRL 1.16's two orders of weighing and normalising.

    "sum_then_normalize": group advantages of the weighted sum of the rewards that exist. "normalize_then_sum" (GDPO,
    Liu et al. 2026): each function is normalised within its group, the weighted sum is normalised over the batch;
    `baseline` and `scale` do not apply then.

    Args:
        rewards_per_func: `(B, F)` floating point, NaN where a function gave no reward.
        weights: `(F,)`, or None for ones.
        group_ids, baseline, scale, eps, backend: see `group_advantages`.

    Returns:
        advantages `(B,)`, 0 where no function gave a reward; rewards `(B,)`, the plain weighted sum, NaN there.

    Raises:
        ValueError: an unknown aggregation, or a wrong shape.
    """
    if rewards_per_func.ndim != 2:
        raise ValueError(f"rewards_per_func: expected shape (B, F), got {tuple(rewards_per_func.shape)}")
    functions = rewards_per_func.shape[1]
    if weights is None:
        weights = rewards_per_func.new_ones(functions)
    if weights.shape != (functions,):
        raise ValueError(f"weights: expected shape ({functions},), one per reward function, got {tuple(weights.shape)}")
    weights = weights.to(rewards_per_func)
    unscorable = rewards_per_func.isnan().all(-1)

    def weighted_sum(columns: Tensor) -> Tensor:
        return (columns * weights).nansum(-1).masked_fill(unscorable, torch.nan)

    rewards = weighted_sum(rewards_per_func)
    if aggregation == "sum_then_normalize":
        advantages = group_advantages(rewards, group_ids, baseline=baseline, scale=scale, eps=eps, backend=backend)
        return advantages, rewards
    if aggregation != "normalize_then_sum":
        raise ValueError(f"aggregation: expected one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    columns = [group_advantages(c, group_ids, eps=eps, backend=backend) for c in rewards_per_func.unbind(-1)]
    combined = weighted_sum(torch.stack(columns, -1).masked_fill(rewards_per_func.isnan(), torch.nan))
    one_group = torch.zeros_like(group_ids)
    return group_advantages(combined, one_group, eps=eps, backend=backend), rewards
