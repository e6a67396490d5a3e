"""What PPO trains on, and its metrics under TRL's names."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.objectives import PPOOutput
from fastrl.trainers.token_batch import TokenBatch


@dataclass(frozen=True)
class PPORollouts(TokenBatch):
    """B sampled sequences; everything per token is 0 outside the mask."""

    advantages: Tensor  # (B, T) fp32
    returns: Tensor  # (B, T)
    old_values: Tensor  # (B, T)
    old_logps: Tensor | None = None  # (B, T); None: the policy has not changed since
    importance_ratio: Tensor | None = None  # (B, T) or (B, 1) factor of the policy term; None: 1

    @property
    def constants(self) -> dict[str, Any]:
        """What the loss takes besides what the models give, under its names."""
        names = ("mask", "advantages", "old_logps", "importance_ratio", "returns", "old_values")
        return {name: getattr(self, name) for name in names}


def objective_metrics(
    scores: Tensor,  # (B,), NaN: none
    mask: Tensor,  # (B, T)
    logps: Tensor | None,  # (B, T); None: not known
    kl: Tensor | None,  # (B, T); None: no KL
    kl_coef: float,
) -> dict[str, Tensor]:
    """objective/*: means over completions, of sums over their tokens."""
    means = {"scores": scores.nanmean()}
    if logps is not None:
        means["entropy"] = -logps.sum(-1).mean()
    means["non_score_reward"] = torch.zeros_like(means["scores"])
    if kl is not None:
        means["kl"] = torch.where(mask, kl, 0.0).sum(-1).mean()
        means["non_score_reward"] = -kl_coef * means["kl"]
    means["rlhf_reward"] = means["scores"] + means["non_score_reward"]
    return {f"objective/{name}": value for name, value in means.items()}


def loss_metrics(out: PPOOutput, rollouts: PPORollouts) -> dict[str, Tensor]:
    """policy/*, loss/* and val/* of one pass: means over its tokens, but its shares of the losses."""
    old = out.logps if rollouts.old_logps is None else rollouts.old_logps
    change, count = torch.where(rollouts.mask, out.logps - old, 0.0), rollouts.mask.sum().clamp(min=1)
    return {
        "policy/approxkl_avg": 0.5 * change.square().sum() / count,
        "policy/clipfrac_avg": out.metrics["clip_ratio/region_mean"],
        "policy/entropy_avg": out.metrics["entropy"],
        "val/clipfrac_avg": out.metrics["vf_clipfrac"],
        "val/ratio": torch.where(rollouts.mask, change.exp(), 0.0).sum() / count,
        "loss/policy_avg": out.metrics["policy_loss"],
        "loss/value_avg": out.metrics["vf_loss"],
    }
