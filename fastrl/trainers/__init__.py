"""Thin trainers on `transformers.Trainer`."""

import transformers

# Trainer has said since 5.23 whether a loss is already normalized; before, it would divide ours once more, in silence.
if not hasattr(transformers.Trainer, "loss_is_scaled_for_ga") or not hasattr(transformers.Trainer, "_run_epoch"):
    raise ImportError(f"fastrl.trainers needs transformers >= 5.23, found {transformers.__version__}")

from fastrl.trainers.grpo import GRPOTrainer
from fastrl.trainers.grpo_config import GRPOConfig

__all__ = ["GRPOConfig", "GRPOTrainer"]
