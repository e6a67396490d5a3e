"""Thin trainers on `transformers.Trainer`."""

from fastrl.trainers.grpo import GRPOTrainer
from fastrl.trainers.grpo_config import GRPOConfig

__all__ = ["GRPOConfig", "GRPOTrainer"]
