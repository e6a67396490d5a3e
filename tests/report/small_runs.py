"""A trainer small enough to be asked what it shows and keeps, and logs as trainers write them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fastrl.trainers.checkpointing import ResumableTrainer

SAMPLE = "<script>alert('pwned')</script> & so on"


class Line(nn.Module):
    """A linear regression as transformers.Trainer wants a model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.layer(x).squeeze(-1) - labels).square().mean()}


class LineTrainer(ResumableTrainer):
    """Adds a metric of every step to the store, and its mean to the logs."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See Trainer."""
        self.metrics.add("train", {"reward": float(self.state.global_step), "none": math.nan})
        self.metrics.count_tokens(10)
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """See Trainer."""
        if "loss" in logs:
            logs.update(self.metrics.drain("train"))
        super().log(logs, start_time)


def grpo_log(step: int) -> dict[str, Any]:
    """A log of GRPO with TRL's names."""
    return {
        "loss": 0.1 / step,
        "grad_norm": 2.0,
        "learning_rate": 1e-6,
        "reward": step / 20,
        "reward_std": 0.4,
        "rewards/exact/mean": step / 20,
        "rewards/exact/std": 0.4,
        "rewards/form/mean": None,
        "frac_reward_zero_std": 0.9,
        "entropy": 2.0 - step / 20,
        "clip_ratio/low_mean": 0.0,
        "completions/mean_length": 14.0 - step / 2,
        "completions/min_length": 2.0,
        "completions/max_length": 16.0,
        "num_tokens": 100.0 * step,
        "my $metric_<b>": step**2,
        "epoch": step / 8,
        "step": step,
        "seconds": 2.0 * step,
    }
