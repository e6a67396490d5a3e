"""From the rewards of a batch to one advantage per completion: baselines and scales over a prompt's completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fastrl_kernels
from fastrl_kernels import validation

from .groups import Groups, running_sum
from .masking import known_finite
from .reward_shaping import rewards_tensor
from .token_advantages import gae

__all__ = [
    "best_of_k_advantages",
    "combine_rewards",
    "gae",
    "gpg_advantages",
    "group_advantages",
    "group_statistics",
    "opo_advantages",
]

AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
BASELINES = ("mean", "leave_one_out", "best_of_k")
LONE = ("zero", "score")


def group_advantages(
    rewards: Tensor | Sequence[Any],  # (B,)
    group_ids: Tensor,  # (B,)
    *,
    baseline: str = "mean",
    scale: str = "group",
    eps: float = 1e-4,
    lone: str = "zero",
    backend: str | None = None,
) -> Tensor:
    """Group-relative advantages `(r - baseline) / (std + eps)`, as TRL 1.16 computes them; no gradient.

    A reward that is None, NaN or infinite is no reward: it is left out of every statistic and gets 0 (TRL lets an
    infinite one turn its group, or with scale "batch" the batch, into 0s). A group whose rewards are all equal gets
    exactly 0, so that the fused losses drop its tokens. To be used where each prompt has several completions and no
    critic: "mean" by default, "leave_one_out" for unbiased gradients of small groups; without a scale, prompts that
    are solved nearly always or never weigh no more than others.

    Args:
        rewards: `(B,)` floating point, or a list of numbers and None.
        group_ids: `(B,)` integers; rows of equal id form a group, of any size, in any order.
        baseline: "mean" of the group (GRPO, Shao et al. 2024, eq. 3); "leave_one_out", the mean of the others (RLOO,
            Ahmadian et al. 2024, eq. 8); "best_of_k": only the best gets one, its lead on the second
            (`best_of_k_advantages` with k the group's size).
        scale: "group" divides by the group's standard deviation (Bessel) + eps, "batch" by the batch's, "none" not
            at all (Dr. GRPO, Liu et al. 2025). TRL's `scale_rewards`.
        eps: added to the standard deviation: 1e-4 in TRL, 1e-6 in verl, 1e-9 in OpenRLHF.
        lone: what a reward that is alone in its group gets: "zero" (TRL; there is nothing to compare it with), or
            "score", itself, as if the baseline were 0 and the group's deviation 1 (verl but for `rloo_vectorized`).
            OpenRLHF gives NaN.
        backend: None chooses; "reference", "cpu", "triton" force ("best_of_k" is the same PyTorch code on each).

    Returns:
        `(B,)` in the dtype of rewards.

    Raises:
        ValueError, TypeError: an unknown baseline, scale or lone, a negative eps, or an argument of the wrong shape or
            dtype; the message names it.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline: expected one of {', '.join(BASELINES)}, got {baseline!r}")
    if baseline == "best_of_k":
        return best_of_k_advantages(rewards, group_ids, scale=scale, eps=eps, lone=lone)
    rewards = _finite(rewards, group_ids)
    advantages = fastrl_kernels.group_advantages(
        rewards, group_ids, baseline=baseline, scale=scale, eps=eps, backend=backend
    )
    if lone == "zero" or (lone == "score" and known_finite(rewards) and not _has_lone(group_ids)):
        return advantages
    return _keep_lone(advantages, rewards, Groups(group_ids), lone, scale, eps)


@torch.no_grad()
def best_of_k_advantages(
    rewards: Tensor | Sequence[Any],  # (B,)
    group_ids: Tensor,  # (B,)
    *,
    k: int | None = None,
    scale: str = "group",
    eps: float = 1e-4,
    lone: str = "zero",
) -> Tensor:
    """Advantages for the best of k completions (pass@k where rewards are 0 or 1); no gradient.

    What completion i adds to the best of k, averaged over the sets S of k completions of its group that hold it:
    `A_i = mean over S of (max r(S) - max r(S without i))`, unbiased for the gradient of `E[max of k]`. With the group's
    rewards in ascending order, `A_i = sum over m <= i of (r_m - r_{m-1}) C(m-1, k-1) / C(n-1, k-1)`. With k the group's
    size (None) only the best has one, its lead on the second: Tang et al. 2025 (arXiv 2503.19595), verl 0.9's
    `grpo_passk`. A smaller k is Walder and Karkhanis 2025 (PKPO), its leave-one-out baseline of k - 1. To be used where
    the model will be sampled k times and the best taken: it keeps exploring on prompts that it solves at times.

    Args:
        rewards, group_ids, lone: see `group_advantages`.
        k: at least 2; None: each group's size, and so for a group of fewer than k. Missing rewards do not count.
        scale, eps: divide by the standard deviation of the rewards of the "group" or "batch" + eps, or "none".

    Raises:
        ValueError, TypeError: k below 2, and as `group_advantages`.
    """
    if k is not None and k < 2:
        raise ValueError(f"k: expected None or a number of completions of at least 2, got {k}")
    rewards = _finite(rewards, group_ids)
    r, groups = rewards.to(torch.float64), Groups(group_ids)
    scored = ~r.isnan()
    order, rank = groups.ascending(r)
    rank = rank.to(torch.float64)
    size = groups.count(scored)[order]
    taken = (size if k is None else size.clamp(max=k)).clamp(min=1)  # k of each row's group
    gaps = torch.where((rank > 0) & scored[order], r[order] - r[order].roll(1), 0.0)
    ways = (rank + 1).lgamma() - (rank - taken + 2).lgamma() - size.lgamma() + (size - taken + 1).lgamma()
    chances = torch.where(rank + 1 >= taken, ways.exp(), 0.0)  # C(rank, k - 1) / C(size - 1, k - 1)
    gains = running_sum(torch.where(gaps > 0, gaps * chances, 0.0), rank)
    advantages = torch.zeros_like(r).scatter(0, order, gains) / _divisor(r, scored, groups, scale, eps)
    nothing = ~scored | (groups.count(scored) < 2) | advantages.isnan()
    return _keep_lone(advantages.masked_fill(nothing, 0.0).to(rewards.dtype), rewards, groups, lone, scale, eps)


@torch.no_grad()
def opo_advantages(
    rewards: Tensor | Sequence[Any],  # (B,)
    lengths: Tensor,  # (B,)
    group_ids: Tensor,  # (B,)
    *,
    lone: str = "zero",
) -> Tensor:
    """OPO (Hao et al. 2025): `r - sum(length * r) / sum(length)` over the group; no gradient.

    The baseline of least gradient variance if the squared norm of a completion's gradient grows with its length. verl
    0.9's `opo` (with lone "score"). For exactly on-policy training, where it needs no scaling.

    Args:
        rewards, group_ids, lone: see `group_advantages`.
        lengths: `(B,)` tokens of each completion; a group without a token has the baseline 0.
    """
    rewards = _finite(rewards, group_ids)
    validation.check_shape("lengths", lengths, tuple(rewards.shape), "one per reward")
    r, groups = rewards.to(torch.float64), Groups(group_ids)
    scored = ~r.isnan()
    advantages = torch.where(scored, r - groups.mean(r, scored, lengths), 0.0).to(rewards.dtype)
    return _keep_lone(advantages.masked_fill(groups.count(scored) < 2, 0.0), rewards, groups, lone, "none", 0.0)


@torch.no_grad()
def gpg_advantages(
    rewards: Tensor | Sequence[Any],  # (B,)
    group_ids: Tensor,  # (B,)
    *,
    f_norm: float = 1.0,
    count: str = "advantages",
    lone: str = "zero",
    backend: str | None = None,
) -> Tensor:
    """GPG (Chu et al. 2025): `alpha (r - group mean) / f_norm`, alpha = B / rows that count; no gradient.

    alpha makes up for the completions of unanimous groups, which have no gradient and yet are averaged over. For
    loss_type "gpg", which has no ratio and no reference, with rewards of 0 and 1.

    Args:
        rewards, group_ids, lone, backend: see `group_advantages`. B is the number of rewards that exist.
        f_norm: divisor, not 0.
        count: rows that count: those of an advantage other than 0 ("advantages", the paper's), or of a reward other
            than 0 ("rewards", verl 0.9's, which counts a prompt that is always solved, and not a wrong answer to one
            that is solved at times).

    Raises:
        ValueError, TypeError: an unknown count, an f_norm of 0, and as `group_advantages`.
    """
    if count not in ("advantages", "rewards"):
        raise ValueError(f"count: expected 'advantages' or 'rewards', got {count!r}")
    if f_norm == 0:
        raise ValueError(f"f_norm: expected a number other than 0, got {f_norm}")
    rewards = _finite(rewards, group_ids)
    advantages = group_advantages(rewards, group_ids, scale="none", lone=lone, backend=backend)
    live = advantages != 0 if count == "advantages" else rewards.nan_to_num() != 0
    alpha = (~rewards.isnan()).sum().double() / live.sum().clamp(min=1)
    return advantages * (alpha / f_norm)


@torch.no_grad()
def group_statistics(rewards: Tensor | Sequence[Any], group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and number of the rewards of each row's group, `(B,)` each, for logging and filtering.

    The deviation has Bessel's correction: exactly 0 where all are equal, NaN for fewer than two. Missing rewards (see
    `group_advantages`) are left out; a group without any has the mean 0.
    """
    rewards = _finite(rewards, group_ids)
    r, groups = rewards.to(torch.float64), Groups(group_ids)
    scored = ~r.isnan()
    mean, deviation = groups.mean(r, scored), groups.deviation(r, scored)
    return mean.to(rewards.dtype), deviation.to(rewards.dtype), groups.count(scored).to(torch.int64)


def combine_rewards(
    rewards_per_func: Tensor | Sequence[Sequence[Any]],  # (B, F)
    weights: Tensor | None,  # (F,)
    group_ids: Tensor,  # (B,)
    *,
    aggregation: str = "sum_then_normalize",
    baseline: str = "mean",
    scale: str = "group",
    eps: float = 1e-4,
    lone: str = "zero",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages from several reward functions, with TRL 1.16's two orders of weighing and normalising.

    "sum_then_normalize": group advantages of the weighted sum of the rewards that exist. "normalize_then_sum" (GDPO,
    Liu et al. 2026): each function is normalised within its group, the weighted sum is normalised over the batch;
    `baseline` and `scale` do not apply then. The former for rewards on one scale, whose ratio is meant; the latter
    where a reward of larger spread would drown the others.

    Args:
        rewards_per_func: `(B, F)` floating point, NaN where a function gave no reward; or lists, with None there.
        weights: `(F,)`, or None for ones.
        group_ids, baseline, scale, eps, lone, backend: see `group_advantages`.

    Returns:
        advantages `(B,)`, 0 where no function gave a reward; rewards `(B,)`, the plain weighted sum, NaN there.

    Raises:
        ValueError: an unknown aggregation, or a wrong shape.
    """
    rewards_per_func, weights = _per_function(rewards_per_func, weights, group_ids)
    rewards = _weighted_sum(rewards_per_func, weights, rewards_per_func)
    if aggregation == "sum_then_normalize":
        advantages = group_advantages(
            rewards, group_ids, baseline=baseline, scale=scale, eps=eps, lone=lone, backend=backend
        )
        return advantages, rewards
    if aggregation != "normalize_then_sum":
        raise ValueError(f"aggregation: expected one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    combined = normalized_sum(rewards_per_func, weights, group_ids, eps=eps, lone=lone, backend=backend)
    return group_advantages(combined, torch.zeros_like(group_ids), eps=eps, backend=backend), rewards


def normalized_sum(
    rewards_per_func: Tensor | Sequence[Sequence[Any]],  # (B, F)
    weights: Tensor | None,  # (F,)
    group_ids: Tensor,  # (B,)
    **options: Any,
) -> Tensor:
    """`(B,)`: the weighted sum of each function's group advantages, NaN where no function gave a reward."""
    rewards_per_func, weights = _per_function(rewards_per_func, weights, group_ids)
    columns = [group_advantages(column, group_ids, **options) for column in rewards_per_func.unbind(-1)]
    if not columns:
        return rewards_per_func.new_full(group_ids.shape, torch.nan)
    return _weighted_sum(torch.stack(columns, -1), weights, rewards_per_func)


def _per_function(rewards: Tensor | Sequence[Any], weights: Tensor | None, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    rewards = rewards_tensor(rewards, device=group_ids.device)
    if rewards.ndim != 2:
        raise ValueError(f"rewards_per_func: expected shape (B, F), got {tuple(rewards.shape)}")
    functions = rewards.shape[1]
    if weights is None:
        weights = rewards.new_ones(functions)
    if weights.shape != (functions,):
        raise ValueError(f"weights: expected shape ({functions},), one per reward function, got {tuple(weights.shape)}")
    return rewards.masked_fill(rewards.isinf(), math.nan), weights.to(rewards)


def _weighted_sum(columns: Tensor, weights: Tensor, given: Tensor) -> Tensor:
    """Over the functions that gave a reward; NaN where none did."""
    missing = given.isnan()
    return torch.where(missing, 0.0, columns * weights).sum(-1).masked_fill(missing.all(-1), torch.nan)


def _finite(rewards: Tensor | Sequence[Any], group_ids: Tensor) -> Tensor:
    """rewards as a `(B,)` tensor that asks for no gradient, NaN where there is none that a mean could take."""
    rewards = rewards_tensor(rewards, device=group_ids.device)
    validation.check_floating("rewards", rewards)
    if rewards.ndim != 1:
        raise ValueError(f"rewards: expected shape (B,), got {tuple(rewards.shape)}")
    validation.check_shape("group_ids", group_ids, tuple(rewards.shape), "one group per reward")
    if group_ids.is_floating_point() or group_ids.dtype == torch.bool:
        raise TypeError(f"group_ids: expected integers, got {group_ids.dtype}")
    return rewards.detach().masked_fill(rewards.isinf(), math.nan)


def _divisor(r: Tensor, scored: Tensor, groups: Groups, scale: str, eps: float) -> Tensor:
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale: expected 'group', 'batch' or 'none', got {scale!r}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    if scale == "none":
        return torch.ones_like(r)
    over = groups if scale == "group" else Groups(torch.zeros_like(r, dtype=torch.int64))
    return over.deviation(r, scored) + eps


def _has_lone(group_ids: Tensor) -> bool:
    _, sizes = group_ids.sort().values.unique_consecutive(return_counts=True)
    return bool((sizes == 1).any())


def _keep_lone(advantages: Tensor, rewards: Tensor, groups: Groups, lone: str, scale: str, eps: float) -> Tensor:
    """advantages, with lone "score" a reward that is alone in its group in place of its advantage."""
    if lone not in LONE:
        raise ValueError(f"lone: expected 'zero' or 'score', got {lone!r}")
    if lone == "zero":
        return advantages
    r = rewards.to(torch.float64)
    scored = ~r.isnan()
    divisor = 1.0 + eps if scale == "group" else _divisor(r, scored, groups, scale, eps)
    return torch.where(scored & (groups.count(scored) == 1), (r / divisor).to(rewards.dtype), advantages)
